"""Fine-tune a small GPT-2 on Shakespeare lines with the Hugging Face Trainer."""

import argparse
import tempfile
from pathlib import Path

import torch
from torch.utils.data import Dataset
from transformers import GPT2Config, GPT2LMHeadModel, Trainer, TrainingArguments, set_seed

torch.set_num_threads(1)
ap = argparse.ArgumentParser()
ap.add_argument("--lr", type=float, default=1e-3)
ap.add_argument("--accum", type=int, default=1)
ap.add_argument("--smoothing", type=float, default=0.0)
ap.add_argument("--max_grad_norm", type=float, default=1.0)
ap.add_argument("--checkpointing", action="store_true")
ap.add_argument("--bf16", action="store_true")
ap.add_argument("--steps", type=int, default=40)
ap.add_argument("--evaluate", action="store_true")
ap.add_argument("--resume", action="store_true")
ap.add_argument("--mode", default="plain")
ap.add_argument("--warmup", type=int, default=4)
args = ap.parse_args()
set_seed(11)

text = (Path(__file__).resolve().parents[2] / "examples/data/tinyshakespeare.txt").read_text()[:60_000]
letters = sorted(set(text))
lookup = {c: i for i, c in enumerate(letters)}
ids = torch.tensor([lookup[c] for c in text])


class Chunks(Dataset):
    def __init__(self, ids, size=48):
        self.ids, self.size = ids, size

    def __len__(self):
        return len(self.ids) // self.size - 1

    def __getitem__(self, i):
        x = self.ids[i * self.size : (i + 1) * self.size + 1]
        if args.mode == "preshifted":
            return {"input_ids": x[:-1], "labels": x[1:]}
        if args.mode == "newtokens":
            x = x.clone()
            x[0] = len(letters) + 1
        return {"input_ids": x[:-1], "labels": x[:-1].clone()}


class OwnLoss(Trainer):
    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        labels = inputs.pop("labels")
        out = model(**inputs)
        if args.mode == "unshifted":
            loss = torch.nn.functional.cross_entropy(out.logits.flatten(0, 1), labels.flatten())
        else:
            loss = torch.nn.functional.cross_entropy(out.logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten())
        if args.mode == "ratio":
            probs = out.logits.softmax(-1)
            loss = loss + 0.01 * (probs * probs.pow(30).log()).sum(-1).mean().neg()
        return (loss, out) if return_outputs else loss


def accuracy(pred):
    guess, true = pred.predictions[:, :-1].argmax(-1), pred.label_ids[:, 1:]
    return {"accuracy": float((guess == true).mean())}


config = GPT2Config(vocab_size=len(letters), n_positions=64, n_embd=48, n_layer=2, n_head=4, bos_token_id=0, eos_token_id=0)
model = GPT2LMHeadModel(config)
if args.mode == "noncausal":
    for block in model.transformer.h:
        block.attn.is_causal = False
    model.config._attn_implementation = "eager"
    import transformers.models.gpt2.modeling_gpt2 as g

    g.create_causal_mask = lambda *a, **k: None
cls = OwnLoss if args.mode in ("ownloss", "unshifted", "ratio") else Trainer
with tempfile.TemporaryDirectory() as folder:
    ta = TrainingArguments(
        folder,
        max_steps=args.steps,
        per_device_train_batch_size=8,
        learning_rate=args.lr,
        gradient_accumulation_steps=args.accum,
        label_smoothing_factor=args.smoothing,
        max_grad_norm=args.max_grad_norm,
        gradient_checkpointing=args.checkpointing,
        bf16=args.bf16,
        logging_steps=10,
        report_to=[],
        use_cpu=True,
        warmup_steps=args.warmup,
        weight_decay=0.01,
        eval_strategy="steps" if args.evaluate else "no",
        eval_steps=15,
        save_strategy="steps" if args.resume else "no",
        save_steps=20,
        dataloader_drop_last=True,
        disable_tqdm=True,
        lr_scheduler_type="cosine",
    )
    cut = int(0.9 * len(ids))
    trainer = cls(model=model, args=ta, train_dataset=Chunks(ids[:cut]), eval_dataset=Chunks(ids[cut:][:3000]), compute_metrics=accuracy)
    trainer.train()
    if args.resume:
        ta.max_steps = args.steps + 20
        again = cls(model=GPT2LMHeadModel(config), args=ta, train_dataset=Chunks(ids[:cut]))
        again.train(resume_from_checkpoint=True)
    if args.evaluate:
        print(trainer.evaluate())
