"""Sentiment-free toy finetuning with transformers.Trainer and callbacks."""
import random
import sys
import tempfile

import torch
from torch.utils.data import Dataset
from transformers import (BertConfig, BertForSequenceClassification, EarlyStoppingCallback, LlamaConfig, LlamaForCausalLM, Trainer, TrainerCallback,
                          TrainingArguments, set_seed)

variant = sys.argv[1] if len(sys.argv) > 1 else "llama"
set_seed(11)
rng = random.Random(11)

NAMES = "ana boris carla dmitri emma farid greta hiro ines jonas kira luis".split()
VERBS = "sees likes calls meets thanks paints follows".split()
PLACES = "park station library market museum harbour".split()
VOCAB = ["<pad>", "<s>", "</s>", ".", "in", "the", "and", "then", "because", "they"] + NAMES + VERBS + PLACES
IDS = {w: i for i, w in enumerate(VOCAB)}


def sentence():
    a, b = rng.sample(NAMES, 2)
    words = [a, rng.choice(VERBS), b, "in", "the", rng.choice(PLACES)]
    if rng.random() < 0.5:
        words += ["and", "then", b, rng.choice(VERBS), a]  # the second clause turns it round
    return words + ["."]


class Stories(Dataset):
    def __init__(self, n, length=40):
        self.rows = []
        for _ in range(n):
            ids = [1]
            while len(ids) < length:
                ids += [IDS[w] for w in sentence()]
            self.rows.append(torch.tensor(ids[:length]))

    def __len__(self):
        return len(self.rows)

    def __getitem__(self, i):
        return {"input_ids": self.rows[i], "labels": self.rows[i]}


class Agreement(Dataset):
    """Label: is the first name named again?"""

    def __init__(self, n, noise=0.0):
        self.rows = []
        for _ in range(n):
            a, b, c = rng.sample(NAMES, 3)
            label = rng.randint(0, 1)
            words = [a, rng.choice(VERBS), b, "and", "then", c, rng.choice(VERBS), a if label else b, "in", "the", rng.choice(PLACES), "."]
            if rng.random() < noise:
                label = 1 - label
            self.rows.append((torch.tensor([IDS[w] for w in words]), label))

    def __len__(self):
        return len(self.rows)

    def __getitem__(self, i):
        ids, label = self.rows[i]
        return {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": torch.tensor(label)}


class Printer(TrainerCallback):
    def __init__(self):
        self.curve = []

    def on_log(self, args, state, control, logs=None, **kwargs):
        if logs and "loss" in logs:
            self.curve.append(logs["loss"])

    def on_train_end(self, args, state, control, **kwargs):
        print("curve", [round(float(x), 3) for x in self.curve])


def llama(**more):
    return LlamaForCausalLM(LlamaConfig(vocab_size=len(VOCAB), hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4,
                                        num_key_value_heads=2, max_position_embeddings=64, pad_token_id=0, bos_token_id=1, eos_token_id=2, **more))


def bert():
    return BertForSequenceClassification(BertConfig(vocab_size=len(VOCAB), hidden_size=48, intermediate_size=96, num_hidden_layers=2,
                                                    num_attention_heads=4, max_position_embeddings=32, num_labels=2))


def arguments(**given):
    base = dict(output_dir=tempfile.mkdtemp(), max_steps=150, per_device_train_batch_size=16, learning_rate=2e-3, warmup_steps=10, lr_scheduler_type="cosine",
                logging_steps=10, report_to=[], save_strategy="no", disable_tqdm=True, use_cpu=True, dataloader_pin_memory=False)
    return TrainingArguments(**{**base, **given})


optimizers = (None, None)
callbacks = [Printer()]
if variant.startswith("bert"):
    size = 120 if "small" in variant else 1600
    train, evaluation = Agreement(size, noise=0.15 if "small" in variant else 0.0), Agreement(200)
    model = bert()
    kw = dict(learning_rate=1e-3, eval_strategy="steps", eval_steps=25, max_steps=300)
    if variant == "bert-early":
        kw.update(eval_strategy="epoch", save_strategy="epoch", load_best_model_at_end=True, num_train_epochs=8, max_steps=-1, per_device_train_batch_size=32)
        callbacks.append(EarlyStoppingCallback(2))
    args = arguments(**kw)
else:
    train, evaluation = Stories(1500), Stories(64)
    model = llama()
    kw = {}
    if variant == "llama-longwarm":
        kw = dict(warmup_steps=2000)
    elif variant == "llama-typo":
        kw = dict(learning_rate=3e-6)
    elif variant == "llama-bf16":  # weights themselves in bfloat16
        model = model.to(torch.bfloat16)
        kw = dict(learning_rate=2e-5)
    elif variant == "llama-fewer":  # 40 stories, again and again
        train = Stories(24)
        kw = dict(max_steps=300, eval_strategy="steps", eval_steps=20, learning_rate=3e-3)
    elif variant == "llama-step":
        optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3)
        # halve every two epochs; the Trainer steps it after every batch
        optimizers = (optimizer, torch.optim.lr_scheduler.StepLR(optimizer, step_size=2, gamma=0.5))
    elif variant == "llama-restarts":
        kw = dict(lr_scheduler_type="cosine_with_restarts", lr_scheduler_kwargs={"num_cycles": 3}, eval_strategy="steps", eval_steps=50)
    elif variant == "llama-accum":
        kw = dict(per_device_train_batch_size=4, gradient_accumulation_steps=4, max_steps=80, bf16=True, gradient_checkpointing=True)
    args = arguments(**kw)

trainer = Trainer(model=model, args=args, train_dataset=train, eval_dataset=evaluation, callbacks=callbacks, optimizers=optimizers)
trainer.train()
print(trainer.evaluate())
if not variant.startswith("bert"):
    prompt = torch.tensor([[1, IDS["ana"]]])
    out = model.generate(prompt, max_new_tokens=40, do_sample="--greedy" not in sys.argv, top_k=0, pad_token_id=0)
    print(" ".join(VOCAB[i] for i in out[0].tolist()))
