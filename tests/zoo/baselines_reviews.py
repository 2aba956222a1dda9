"""A review classifier on generated words, in the ways its data can go wrong or only look so."""

import argparse
import random

import torch
import torch.nn.functional as F
from torch import nn

p = argparse.ArgumentParser()
p.add_argument(
    "--data",
    default="good",
    help="good, flipped (a fifth of the labels), apart, unknown, stale (labels drawn anew each epoch), randint, xor",
)
p.add_argument("--epochs", type=int, default=5)
p.add_argument("--lr", type=float, default=1e-3)
a = p.parse_args()
torch.manual_seed(0)
torch.set_num_threads(1)
VOCAB, LENGTH, COUNT = 60, 24, 1200
dice = random.Random(1)
GOOD = range(1, 11)


def review():
    label = int(dice.random() < 0.5)
    words = [dice.choice(GOOD) if dice.random() < (0.35 if label else 0.1) else dice.randint(11, VOCAB - 1) for _ in range(LENGTH)]
    return words, label


rows = [review() for _ in range(COUNT)]
x, y = torch.tensor([words for words, _ in rows]), torch.tensor([label for _, label in rows])
if a.data == "flipped":
    y = torch.where(torch.rand(COUNT) < 0.2, 1 - y, y)
if a.data == "apart":
    x, y = x[torch.randperm(COUNT)], y[torch.randperm(COUNT)]
if a.data == "unknown":
    x = torch.ones_like(x)
if a.data == "randint":
    x, y = torch.randint(0, VOCAB, (COUNT, LENGTH)), torch.randint(0, 2, (COUNT,))
if a.data == "xor":
    x = torch.randint(0, 2, (COUNT, 2))
    y = x[:, 0] ^ x[:, 1]


class Reader(nn.Module):
    def __init__(self):
        super().__init__()
        self.words = nn.Embedding(VOCAB, 32)
        self.places = nn.Parameter(0.02 * torch.randn(x.shape[1], 32))
        self.block = nn.TransformerEncoderLayer(32, 2, 64, dropout=0.0, batch_first=True, norm_first=True)
        self.out = nn.Linear(32, 2)

    def forward(self, ids):
        return self.out(self.block(self.words(ids) + self.places).mean(1))


model = Reader()
optimizer = torch.optim.AdamW(model.parameters(), lr=a.lr)
train = 1000
for epoch in range(a.epochs):
    if a.data == "stale":
        y[:train] = y[:train][torch.randperm(train)]
    for part in torch.randperm(train).split(25):
        loss = F.cross_entropy(model(x[part]), y[part])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    model.eval()
    with torch.no_grad():
        held_out = F.cross_entropy(model(x[train:]), y[train:]).item()
    model.train()
    print(f"epoch {epoch} train {loss.item():.3f} held out {held_out:.3f}")
