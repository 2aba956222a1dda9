"""A life in three acts, saved between them: pretraining a little encoder, fine-tuning it for thirty careful steps, and only evaluating."""

import os
import pathlib
import sys
import tempfile

os.environ.setdefault("HF_HUB_OFFLINE", "1")
import torch
from torch import nn
from torch.optim.lr_scheduler import LambdaLR
from transformers import BertConfig, BertForMaskedLM, BertForSequenceClassification

act, slip = ([*sys.argv[1:], "", ""])[:2]
torch.manual_seed(40)
torch.set_num_threads(1)
text = (pathlib.Path(__file__).parents[2] / "examples/data/tinyshakespeare.txt").read_text()
lines = [x for x in text.splitlines() if 8 < len(x) < 40]
letters = {c: i + 4 for i, c in enumerate(sorted(set("".join(lines))))}
PAD, CLS, SEP, MASK = range(4)
size = len(letters) + 4


def encode(batch):
    ids = [[CLS, *(letters[c] for c in s), SEP] for s in batch]
    wide = max(map(len, ids))
    ids = torch.tensor([r + [PAD] * (wide - len(r)) for r in ids])
    return {"input_ids": ids, "attention_mask": (ids != PAD).long()}


def corrupt(enc):
    """80 % hidden, 10 % another letter, 10 % as it is, of 15 % of the letters."""
    ids = enc["input_ids"]
    pick = (torch.rand(ids.shape) < 0.15) & (ids > 3)
    labels = torch.where(pick, ids, -100)
    if slip == "labelsall":
        labels = ids.clone()
    u = torch.rand(ids.shape)
    ids = torch.where(pick & (u < 0.8), MASK, torch.where(pick & (u > 0.9), torch.randint(4, size, ids.shape), ids))
    return {**enc, "input_ids": ids, "labels": labels}


def sample(n):
    return [lines[i] for i in torch.randint(len(lines), (n,)).tolist()]


conf = BertConfig(
    vocab_size=size,
    hidden_size=64,
    num_hidden_layers=2,
    num_attention_heads=4,
    intermediate_size=128,
    max_position_embeddings=48,
    pad_token_id=PAD,
)
work = pathlib.Path(tempfile.mkdtemp())


def pretrain(steps, lr=2e-3):
    model = BertForMaskedLM(conf)
    if slip == "newtokens":
        head = model.cls.predictions.decoder
        model.bert.embeddings.word_embeddings = nn.Embedding(size, 64, padding_idx=PAD)
        assert head.weight.shape[0] == size
    opt = torch.optim.AdamW(model.parameters(), lr=lr)
    sched = LambdaLR(opt, lambda s: min(1.0, (s + 1) / 15))
    model.train()
    for s in range(steps):
        out = model(**corrupt(encode(sample(24))))
        out.loss.backward()
        opt.step()
        sched.step()
        model.zero_grad()
        if s % 25 == 0:
            print("mlm", s, round(out.loss.item(), 3))
    model.save_pretrained(work / "mlm")
    return model


def finetune(steps=30, lr=5e-5, batch=4):
    model = BertForSequenceClassification.from_pretrained(work / "mlm", num_labels=2)
    opt = torch.optim.AdamW(model.parameters(), lr=lr)
    if slip == "resized":
        model.resize_token_embeddings(size + 2)
    for s in range(steps):
        model.train()
        rows = sample(batch)
        y = torch.tensor([int(r.strip()[-1] in ".?!") for r in rows])
        loss = model(**encode([r.strip() for r in rows]), labels=y).loss
        opt.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        opt.step()
        if s % 10 == 0:
            print("tune", s, round(loss.item(), 3))
    return model


@torch.no_grad()
def evaluate(model, rounds=12):
    if slip != "evaltrain":
        model.eval()
    total = 0.0
    for _ in range(rounds):
        total += model(**corrupt(encode(sample(32)))).loss.item()
    print("held loss", round(total / rounds, 3))


if act == "evaluate":
    BertForMaskedLM(conf).save_pretrained(work / "mlm")
    evaluate(BertForMaskedLM.from_pretrained(work / "mlm"))
elif act == "tune":
    BertForMaskedLM(conf).save_pretrained(work / "mlm")
    finetune()
else:
    evaluate(pretrain(100))
    if act == "all":
        finetune()
