"""A small encoder that classifies sequences, in a hand-written loop. `--slow` names what makes it slow; `--like` a healthy look-alike."""

import argparse
import copy
import hashlib
import time

import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.data import DataLoader, Dataset

parser = argparse.ArgumentParser()
parser.add_argument("--slow", default="")
parser.add_argument("--like", default="")
parser.add_argument("--steps", type=int, default=30)
args = parser.parse_args()
kind = args.slow or args.like
torch.manual_seed(1)
VOCAB, LENGTH, WIDTH, CLASSES, ROWS = 50, 24, 64, 4, 16
if kind == "float64":
    WIDTH, LENGTH, ROWS = 160, 48, 32
    torch.set_default_dtype(torch.float64)
elif kind == "positions":
    LENGTH, ROWS = 64, 4
elif kind == "tiny-float64":
    WIDTH = 16
    torch.set_default_dtype(torch.float64)


class Mixer(nn.Module):
    """One attention layer in one of several spellings."""

    def __init__(self):
        super().__init__()
        self.qkv = nn.Linear(WIDTH, 3 * WIDTH)
        self.out = nn.Linear(WIDTH, WIDTH)

    def forward(self, x):
        q, k, v = self.qkv(x).chunk(3, -1)
        if kind == "positions":
            rows = [torch.softmax((k @ q[:, t, :, None]).squeeze(-1) / WIDTH**0.5, -1)[:, None] @ v for t in range(x.shape[1])]
            return self.out(torch.cat(rows, 1))
        if kind == "broadcast":
            scores = (q[:, :, None, :] * k[:, None, :, :]).sum(-1) / WIDTH**0.5
            return self.out((scores.softmax(-1)[..., None] * v[:, None]).sum(2))
        if kind == "written-out":
            return self.out(torch.softmax(q @ k.transpose(1, 2) / WIDTH**0.5, -1) @ v)
        return self.out(F.scaled_dot_product_attention(q, k, v))


class Classifier(nn.Module):
    def __init__(self):
        super().__init__()
        self.tokens = nn.Embedding(VOCAB, WIDTH)
        self.places = nn.Parameter(torch.zeros(LENGTH, WIDTH))
        self.mixers = nn.ModuleList(Mixer() for _ in range(2))
        self.norms = nn.ModuleList(nn.LayerNorm(WIDTH) for _ in range(4))
        self.wides = nn.ModuleList(nn.Sequential(nn.Linear(WIDTH, 4 * WIDTH), nn.GELU(), nn.Linear(4 * WIDTH, WIDTH)) for _ in range(2))
        if kind == "recurrent":
            self.cell = nn.GRUCell(WIDTH, WIDTH)
        if kind == "heads":
            self.heads = nn.ModuleList(nn.Linear(WIDTH, WIDTH // 4) for _ in range(4))
        self.head = nn.Linear(WIDTH, CLASSES)

    def forward(self, ids):
        x = self.tokens(ids) + self.places
        for i, (mixer, wide) in enumerate(zip(self.mixers, self.wides)):
            if kind == "clones":
                for _ in range(3):
                    x = x.clone().contiguous().double().float()
                    assert not x.isnan().any().item() and x.abs().max().item() < 1e6
            x = x + mixer(self.norms[2 * i](x))
            x = x + wide(self.norms[2 * i + 1](x))
        if kind == "recurrent":
            state = torch.zeros(len(ids), WIDTH)
            for t in range(x.shape[1]):
                state = self.cell(x[:, t], state)
            return self.head(state)
        if kind == "heads":
            return self.head(torch.cat([head(x.mean(1)) for head in self.heads], -1))
        if kind == "clone-then-write":
            pooled = x.clone()
            pooled[:, 0] = 0.0
            return self.head(pooled.mean(1))
        return self.head(x.mean(1))


class Rows(Dataset):
    def __len__(self):
        return ROWS * (args.steps + 4)

    def __getitem__(self, index):
        draw = torch.Generator().manual_seed(index)
        ids = torch.randint(VOCAB, (LENGTH,), generator=draw)
        if kind == "hashing":
            for token in ids.tolist() * 12:
                hashlib.sha256(f"{index} {token}".encode() * 20).hexdigest()
        elif kind == "storage":
            time.sleep(0.004)
        return ids, ids.bincount(minlength=VOCAB)[:CLASSES].argmax()


def strings(count):
    """Rows made of strings between two steps."""
    rows = []
    for _ in range(count):
        words = [str(int(number)) for number in torch.randint(VOCAB, (LENGTH,))]
        for word in words * 8:
            hashlib.md5((word * 300).encode()).hexdigest()
        rows.append([int(word) for word in " ".join(words).split()])
    ids = torch.tensor(rows)
    return ids, (ids[:, :8].sum(1)) % CLASSES


model = Classifier()
optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
batches = iter(DataLoader(Rows(), batch_size=1 if kind == "one-row" else ROWS, shuffle=True))
for step in range(args.steps):
    ids, labels = strings(ROWS) if kind == "strings" else next(batches)
    if kind == "one-by-one":
        optimizer.zero_grad()
        for row, label in zip(ids, labels):
            (F.cross_entropy(model(row.unsqueeze(0)), label.unsqueeze(0)) / ROWS).backward()
    elif kind == "one-by-one-sum":
        loss = torch.stack([F.cross_entropy(model(ids[i : i + 1]), labels[i : i + 1]) for i in range(ROWS)]).mean()
        optimizer.zero_grad()
        loss.backward()
    elif kind == "accumulate":
        optimizer.zero_grad()
        for micro in range(4):
            (F.cross_entropy(model(ids[micro::4]), labels[micro::4]) / 4).backward()
    else:
        loss = F.cross_entropy(model(ids), labels)
        optimizer.zero_grad()
        loss.backward()
    optimizer.step()
    if kind == "snapshot":
        backup = [copy.deepcopy(model.state_dict()) for _ in range(12)][-1]
    elif kind == "evaluate" and step % 5 == 4:
        model.eval()
        with torch.no_grad():
            print(step, sum(float(F.cross_entropy(model(ids), labels)) for _ in range(20)) / 20)
        model.train()
    elif kind == "rest" and step % 10 == 9:
        time.sleep(0.3)
        torch.save(model.state_dict(), "/dev/null")
