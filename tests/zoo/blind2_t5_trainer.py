"""T5 learns to spell words backwards under transformers' Trainer; the collator pads."""

import random
import sys
import tempfile
from pathlib import Path

import torch
from transformers import T5Config, T5ForConditionalGeneration, Trainer, TrainingArguments

kind = sys.argv[1] if len(sys.argv) > 1 else "good"
random.seed(5)
torch.set_num_threads(1)
words = sorted(set((Path(__file__).parents[2] / "examples/data/tinyshakespeare.txt").read_text()[:60_000].lower().split()))
words = [w for w in words if w.isalpha() and 2 < len(w) < 12]
random.shuffle(words)
letters = {c: i + 3 for i, c in enumerate("abcdefghijklmnopqrstuvwxyz")}
PAD, EOS = 0, 1


class Spelling(torch.utils.data.Dataset):
    def __init__(self, part):
        self.part = part

    def __len__(self):
        return len(self.part)

    def __getitem__(self, i):
        ids = [letters[c] for c in self.part[i]]
        return {"input_ids": [*ids, EOS], "labels": [*ids[::-1], EOS]}


def pad(rows, value):
    width = max(map(len, rows))
    return torch.tensor([r + [value] * (width - len(r)) for r in rows])


def collator(features):
    ids = pad([f["input_ids"] for f in features], PAD)
    labels = pad([f["labels"] for f in features], PAD if kind == "padlabels" else -100)
    if kind == "strangers":
        labels = labels[torch.randperm(len(labels))]
    batch = {"input_ids": ids, "labels": labels}
    if kind != "nomask":
        batch["attention_mask"] = (ids != PAD).long()
    return batch


model = T5ForConditionalGeneration(
    T5Config(
        vocab_size=32,
        d_model=48,
        d_kv=12,
        d_ff=96,
        num_layers=2,
        num_heads=4,
        decoder_start_token_id=PAD,
        pad_token_id=PAD,
        eos_token_id=EOS,
    )
)
if kind == "accumulate-told":
    model.accepts_loss_kwargs = False  # the Trainer divides, since this model's loss does not look at the number of items
with tempfile.TemporaryDirectory() as out:
    trainer = Trainer(
        model=model,
        args=TrainingArguments(
            out,
            per_device_train_batch_size=16,
            gradient_accumulation_steps=2 if kind.startswith("accumulate") else 1,
            max_steps=50,
            learning_rate=3e-3,
            warmup_steps=5,
            lr_scheduler_type="constant_with_warmup",
            logging_steps=10,
            eval_strategy="steps",
            eval_steps=25,
            save_strategy="no",
            report_to=[],
            use_cpu=True,
            disable_tqdm=True,
        ),
        train_dataset=Spelling(words[:1500]),
        eval_dataset=Spelling(words[1500:1580]),
        data_collator=collator,
    )
    trainer.train()
    print(trainer.evaluate())
