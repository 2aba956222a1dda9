"""Gradient accumulation divides what is already accumulated, at every micro-step.

With four micro-batches the gradients were divided by four after each `backward`, sum and all: the first micro-batch of the four weighs
1/256, the last 1/4, where each should weigh 1/4. The loss that was printed was right all the same. From a training loop written from
scratch; the fault itself has no public thread. In the one below a reviewer asks for what repairs it: divide once, before the step, and
not all the way.

Thread: https://github.com/AI-Hypercomputer/maxtext/pull/787
Condition: accumulation-weighting
"""

import sys
from pathlib import Path

import torch
from torch import nn
from torch.nn import functional as F

FIXED = "fixed" in sys.argv[1:]
STEPS, MICRO_BATCHES, BATCH, CONTEXT, DIM = 40, 4, 6, 32, 48

text = (Path(__file__).resolve().parent.parent / "data" / "tinyshakespeare.txt").read_text()[:100_000]
characters = sorted(set(text))
ids = torch.tensor([characters.index(c) for c in text])


class CharacterModel(nn.Module):
    def __init__(self):
        super().__init__()
        self.embedding = nn.Embedding(len(characters), DIM)
        self.recurrent = nn.GRU(DIM, DIM, batch_first=True)
        self.head = nn.Linear(DIM, len(characters))

    def forward(self, x):
        return self.head(self.recurrent(self.embedding(x))[0])


def get_batch():
    starts = torch.randint(len(ids) - CONTEXT - 1, (BATCH,)).tolist()
    rows = torch.stack([ids[s : s + CONTEXT + 1] for s in starts])
    return rows[:, :-1], rows[:, 1:]


def average_gradients(parameters):
    for parameter in parameters:
        parameter.grad /= MICRO_BATCHES


torch.manual_seed(0)
model = CharacterModel()
optimizer = torch.optim.Adam(model.parameters(), lr=3e-3)

for step in range(STEPS):
    optimizer.zero_grad()
    total = 0.0
    for _ in range(MICRO_BATCHES):
        x, y = get_batch()
        loss = F.cross_entropy(model(x).flatten(0, 1), y.flatten())
        loss.backward()
        total += loss.item()
        if not FIXED:
            average_gradients(model.parameters())
    if FIXED:
        average_gradients(model.parameters())
    nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    optimizer.step()
    if step % 10 == 9:
        print(f"step {step + 1}: loss {total / MICRO_BATCHES:.3f}")
