"""Attention heads are stacked in front of the batch and joined with a plain view: rows of the batch end up in one another.

A reader of a question-answering model found `heads` of shape (heads, batch, length, value) turned into (batch, length, -1) by `view` alone,
where the heads have to be moved behind the length first. The published results were not touched because they used one head; with several,
each row's output is cut out of other rows. Repair: permute before the view.

Thread: https://github.com/hackiey/QAnet-pytorch/issues/2
Condition: batch-mixing
"""

import sys
from pathlib import Path

import torch
from torch import nn
from torch.nn import functional as F

FIXED = "fixed" in sys.argv[1:]
DIM, HEADS, LENGTH, BATCH, STEPS = 48, 4, 32, 12, 100
VALUE = DIM // HEADS

text = (Path(__file__).resolve().parent.parent / "data" / "tinyshakespeare.txt").read_text()[:120_000]
characters = sorted(set(text))
data = torch.tensor([characters.index(c) for c in text])
capital = torch.tensor([c.isupper() for c in text])


class SelfAttention(nn.Module):
    def __init__(self):
        super().__init__()
        self.queries = nn.ModuleList(nn.Linear(DIM, VALUE) for _ in range(HEADS))
        self.keys = nn.ModuleList(nn.Linear(DIM, VALUE) for _ in range(HEADS))
        self.values = nn.ModuleList(nn.Linear(DIM, VALUE) for _ in range(HEADS))
        self.out = nn.Linear(DIM, DIM)

    def forward(self, x):
        batch_size, l, _ = x.shape
        heads = torch.zeros(HEADS, batch_size, l, VALUE)
        for i in range(HEADS):
            scores = self.queries[i](x) @ self.keys[i](x).transpose(1, 2) / VALUE**0.5
            heads[i] = F.softmax(scores, dim=-1) @ self.values[i](x)
        if FIXED:
            x = heads.permute(1, 2, 0, 3).contiguous().view(batch_size, l, -1)
        else:
            x = heads.view(batch_size, l, -1)
        return self.out(x)


class Encoder(nn.Module):
    """Marks in each position whether the character was a capital, from lower-cased text."""

    def __init__(self):
        super().__init__()
        self.embedding, self.position = nn.Embedding(len(characters), DIM), nn.Embedding(LENGTH, DIM)
        self.norm1, self.norm2, self.norm3 = nn.LayerNorm(DIM), nn.LayerNorm(DIM), nn.LayerNorm(DIM)
        self.attention = SelfAttention()
        self.feed = nn.Sequential(nn.Linear(DIM, 2 * DIM), nn.GELU(), nn.Linear(2 * DIM, DIM))
        self.classify = nn.Linear(DIM, 2)

    def forward(self, ids):
        x = self.embedding(ids) + self.position(torch.arange(ids.shape[1]))
        x = x + self.attention(self.norm1(x))
        x = x + self.feed(self.norm2(x))
        return self.classify(self.norm3(x))


torch.manual_seed(0)
lower = torch.tensor([characters.index(c.lower()) for c in text])
model = Encoder()
optimizer = torch.optim.Adam(model.parameters(), lr=2e-3)
for step in range(STEPS):
    starts = torch.randint(len(data) - LENGTH, (BATCH,))
    ids = torch.stack([lower[s : s + LENGTH] for s in starts])
    labels = torch.stack([capital[s : s + LENGTH] for s in starts]).long()
    loss = F.cross_entropy(model(ids).view(-1, 2), labels.view(-1))
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
    if step % 25 == 24:
        print(f"step {step + 1}: loss {loss.item():.3f}")
