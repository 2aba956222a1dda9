"""Small Hugging Face models with the Trainer."""
import argparse
import os

os.environ["TOKENIZERS_PARALLELISM"] = "false"
import torch
from torch.utils.data import Dataset
from transformers import (BartConfig, BartForConditionalGeneration, BertConfig, BertForSequenceClassification, EarlyStoppingCallback,
                          GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM, T5Config, T5ForConditionalGeneration, Trainer,
                          TrainingArguments, set_seed)

parser = argparse.ArgumentParser()
parser.add_argument("model")
parser.add_argument("--lr", type=float, default=1e-3)
parser.add_argument("--steps", type=int, default=80)
parser.add_argument("--epochs", type=float, default=0)
parser.add_argument("--warmup", type=int, default=5)
parser.add_argument("--schedule", default="cosine")
parser.add_argument("--optim", default="adamw_torch")
parser.add_argument("--smoothing", type=float, default=0.0)
parser.add_argument("--rows", type=int, default=600)
parser.add_argument("--noise", type=float, default=0.0)
parser.add_argument("--eval", type=int, default=0)
parser.add_argument("--stop", type=int, default=0)
parser.add_argument("--bf16", action="store_true")
parser.add_argument("--halfweights", action="store_true")
parser.add_argument("--batch", type=int, default=16)
parser.add_argument("--wd", type=float, default=0.01)
parser.add_argument("--clip", type=float, default=1.0)
parser.add_argument("--say", default="")
args = parser.parse_args()
set_seed(7)
TEXT = open(os.path.join(os.path.dirname(os.path.abspath(__file__)), "..", "..", "examples", "data", "tinyshakespeare.txt")).read()
BYTES = torch.tensor(list(TEXT[:120000].encode()))


class Windows(Dataset):
    def __init__(self, first, count, width=48):
        self.first, self.count, self.width = first, count, width

    def __len__(self):
        return self.count

    def __getitem__(self, i):
        w = BYTES[(self.first + i) * self.width :][: self.width]
        return {"input_ids": w, "labels": w.clone()}


class Reviews(Dataset):
    """Lines spoken early or late in the play, told apart by a few frequent words planted into them."""

    def __init__(self, seed, count):
        g = torch.Generator().manual_seed(seed)
        self.x = torch.randint(5, 300, (count, 24), generator=g)
        y = torch.randint(0, 2, (count,), generator=g)
        for i in range(count):
            self.x[i, torch.randperm(24, generator=g)[:3]] = 10 + int(y[i]) * 8 + torch.randint(0, 8, (3,), generator=g)
        flip = torch.rand(count, generator=g) < args.noise
        self.y = torch.where(flip, 1 - y, y)

    def __len__(self):
        return len(self.y)

    def __getitem__(self, i):
        return {"input_ids": self.x[i], "attention_mask": torch.ones(24, dtype=torch.long), "labels": self.y[i]}


class Reverse(Dataset):
    def __init__(self, seed, count):
        g = torch.Generator().manual_seed(seed)
        self.x = torch.randint(4, 20, (count, 8), generator=g)

    def __len__(self):
        return len(self.x)

    def __getitem__(self, i):
        end = torch.tensor([1])
        return {"input_ids": torch.cat([self.x[i], end]), "attention_mask": torch.ones(9, dtype=torch.long),
                "labels": torch.cat([self.x[i].sort()[0], end])}


small = dict(num_hidden_layers=2, num_attention_heads=2, hidden_size=48, intermediate_size=96)
if args.model == "gpt2":
    model = GPT2LMHeadModel(GPT2Config(vocab_size=256, n_positions=64, n_embd=48, n_layer=2, n_head=2, bos_token_id=0, eos_token_id=0))
    train, val = Windows(0, args.rows), Windows(2000, 60)
elif args.model == "llama":
    model = LlamaForCausalLM(LlamaConfig(vocab_size=256, max_position_embeddings=64, **small))
    train, val = Windows(0, args.rows), Windows(2000, 60)
elif args.model == "bert":
    model = BertForSequenceClassification(BertConfig(vocab_size=300, max_position_embeddings=32, num_labels=2, **small))
    train, val = Reviews(0, args.rows), Reviews(1, 100)
elif args.model == "t5":
    model = T5ForConditionalGeneration(T5Config(vocab_size=20, d_model=48, d_kv=16, d_ff=96, num_layers=2, num_heads=3,
                                                decoder_start_token_id=0))
    train, val = Reverse(0, args.rows), Reverse(1, 60)
else:
    model = BartForConditionalGeneration(BartConfig(vocab_size=20, d_model=48, encoder_layers=2, decoder_layers=2, encoder_ffn_dim=96,
        decoder_ffn_dim=96, encoder_attention_heads=2, decoder_attention_heads=2, max_position_embeddings=32, pad_token_id=0,
        bos_token_id=2, eos_token_id=1, decoder_start_token_id=1, forced_eos_token_id=1))
    train, val = Reverse(0, args.rows), Reverse(1, 60)
if args.halfweights:
    model = model.to(torch.bfloat16)
more = {}
if args.eval:
    more = dict(eval_strategy="steps", eval_steps=args.eval)
if args.stop:
    more |= dict(load_best_model_at_end=True, save_strategy="steps", save_steps=args.eval, metric_for_best_model="eval_loss", save_total_limit=1)
import tempfile

config = TrainingArguments(
    output_dir=tempfile.mkdtemp(), per_device_train_batch_size=args.batch, learning_rate=args.lr, warmup_steps=args.warmup,
    lr_scheduler_type=args.schedule, optim=args.optim, label_smoothing_factor=args.smoothing, weight_decay=args.wd, logging_steps=10,
    max_steps=-1 if args.epochs else args.steps, num_train_epochs=args.epochs or 3, report_to=[], use_cpu=True, disable_tqdm=True,
    bf16=args.bf16, max_grad_norm=args.clip, **({"save_strategy": "no"} | more))
trainer = Trainer(model=model, args=config, train_dataset=train, eval_dataset=val,
                  callbacks=[EarlyStoppingCallback(args.stop)] if args.stop else [])
print(trainer.train().metrics["train_loss"])
if args.say:
    model.eval()
    how = {"greedy": dict(do_sample=False), "hot": dict(do_sample=True, temperature=3.0, top_k=0), "warm": dict(do_sample=True, temperature=1.2, top_k=0),
           "cool": dict(do_sample=True, temperature=0.8, top_k=20)}[args.say]
    out = model.generate(torch.tensor([list(b"ROMEO:")]), max_new_tokens=56 if args.model == "gpt2" else 120, pad_token_id=0, **how)
    print(bytes(out[0].tolist()))
