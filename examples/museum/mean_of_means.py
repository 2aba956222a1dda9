"""Gradient accumulation averages the means of micro-batches that hold different numbers of tokens.

Each micro-batch gave the mean over its own tokens, and the trainer divided by the number of micro-batches. With padded batches, whose
texts differ in length, a token of a short one then counts for more than one of a long one: accumulation, meant to be the same as a large
batch, was not. Years of runs in several libraries had it. Repair: sum the losses, divide by the tokens of the whole step.

Thread: https://github.com/huggingface/transformers/pull/34191
Condition: accumulation-weighting
"""

import random
import sys
from pathlib import Path

import torch
from torch import nn
from torch.nn import functional as F

FIXED = "fixed" in sys.argv[1:]
GRADIENT_ACCUMULATION_STEPS, STEPS, DIM, HEADS, LONGEST = 4, 30, 32, 4, 96

text = (Path(__file__).resolve().parent.parent / "data" / "tinyshakespeare.txt").read_text()[:80_000]
characters = sorted(set(text))
index = {character: number + 1 for number, character in enumerate(characters)}
speeches = [[index[c] for c in speech[:LONGEST]] for speech in text.split("\n\n") if len(speech) > 8]


class Decoder(nn.Module):
    def __init__(self):
        super().__init__()
        self.tokens = nn.Embedding(len(index) + 1, DIM)
        self.positions = nn.Embedding(LONGEST, DIM)
        self.norm1, self.norm2, self.norm3 = nn.LayerNorm(DIM), nn.LayerNorm(DIM), nn.LayerNorm(DIM)
        self.qkv, self.out = nn.Linear(DIM, 3 * DIM), nn.Linear(DIM, DIM)
        self.mlp = nn.Sequential(nn.Linear(DIM, 4 * DIM), nn.GELU(), nn.Linear(4 * DIM, DIM))
        self.head = nn.Linear(DIM, len(index) + 1)

    def forward(self, input_ids):
        B, T = input_ids.shape
        x = self.tokens(input_ids) + self.positions(torch.arange(T))
        q, k, v = self.qkv(self.norm1(x)).view(B, T, 3, HEADS, -1).permute(2, 0, 3, 1, 4)
        x = x + self.out(F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2).reshape(B, T, DIM))
        x = x + self.mlp(self.norm2(x))
        return self.head(self.norm3(x))


def micro_batch():
    rows = random.sample(speeches, 2)
    length = max(map(len, rows))
    input_ids = torch.tensor([row + [0] * (length - len(row)) for row in rows])
    labels = torch.tensor([row + [-100] * (length - len(row)) for row in rows])
    return input_ids[:, :-1], labels[:, 1:]


random.seed(0)
torch.manual_seed(0)
model = Decoder()
optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3)

for step in range(STEPS):
    batches = [micro_batch() for _ in range(GRADIENT_ACCUMULATION_STEPS)]
    num_items_in_batch = sum((labels != -100).sum() for _, labels in batches)
    total = 0.0
    for input_ids, labels in batches:
        logits = model(input_ids).flatten(0, 1)
        if FIXED:
            loss = F.cross_entropy(logits, labels.flatten(), reduction="sum") / num_items_in_batch
        else:
            loss = F.cross_entropy(logits, labels.flatten()) / GRADIENT_ACCUMULATION_STEPS
        loss.backward()
        total += loss.item()
    nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    optimizer.step()
    optimizer.zero_grad()
    if step % 10 == 9:
        print(f"step {step + 1}: loss {total:.3f}")
