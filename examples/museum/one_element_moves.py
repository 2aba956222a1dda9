"""Every gradient is healthy and almost no weight moves: a hand-written Adam writes to the wrong index.

A transformer written from scratch had its own `AdamOptimizer.Step`. Two loops, one over the parameters (i), one over the elements of each
(j); the new value was written to element i instead of j, so that in every tensor a single element took the updates of all. Gradients,
norms and learning rate looked right, and the loss fell a little, through that element. The fault itself has no public thread; the one
below is its relative in another library written from scratch, where the updates went into a copy of the weights and never reached them.

Thread: https://github.com/nntrainer/nntrainer/issues/241
Condition: update-not-applied
"""

import math
import sys
from pathlib import Path

import torch
from torch import nn
from torch.nn import functional as F

FIXED = "fixed" in sys.argv[1:]
STEPS, BATCH, CONTEXT, DIM, HEADS, LAYERS = 40, 8, 32, 32, 4, 2

text = (Path(__file__).resolve().parent.parent / "data" / "tinyshakespeare.txt").read_text()[:100_000]
characters = sorted(set(text))
ids = torch.tensor([characters.index(c) for c in text])


class AdamOptimizer:
    def __init__(self, parameters, lr, beta1=0.9, beta2=0.999, epsilon=1e-8):
        self.parameters = list(parameters)
        self.lr, self.beta1, self.beta2, self.epsilon = lr, beta1, beta2, epsilon
        self.m = [torch.zeros_like(p).view(-1) for p in self.parameters]
        self.v = [torch.zeros_like(p).view(-1) for p in self.parameters]
        self.t = 0

    @torch.no_grad()
    def step(self):
        self.t += 1
        for i, p in enumerate(self.parameters):
            data, grad = p.data.view(-1), p.grad.view(-1)
            self.m[i] = self.beta1 * self.m[i] + (1 - self.beta1) * grad
            self.v[i] = self.beta2 * self.v[i] + (1 - self.beta2) * grad * grad
            m_hat = self.m[i] / (1 - self.beta1**self.t)
            v_hat = self.v[i] / (1 - self.beta2**self.t)
            update = self.lr * m_hat / (v_hat.sqrt() + self.epsilon)
            if FIXED:
                data -= update
            else:
                data[i % len(data)] -= update.sum()

    def zero_grad(self):
        for p in self.parameters:
            p.grad = None


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(DIM), nn.LayerNorm(DIM)
        self.qkv, self.out = nn.Linear(DIM, 3 * DIM), nn.Linear(DIM, DIM)
        self.up, self.down = nn.Linear(DIM, 4 * DIM), nn.Linear(4 * DIM, DIM)

    def forward(self, x):
        B, T, _ = x.shape
        q, k, v = self.qkv(self.norm1(x)).view(B, T, 3, HEADS, DIM // HEADS).permute(2, 0, 3, 1, 4)
        scores = q @ k.transpose(-1, -2) / math.sqrt(DIM // HEADS)
        scores = scores.masked_fill(torch.ones(T, T, dtype=torch.bool).triu(1), float("-inf"))
        x = x + self.out((scores.softmax(-1) @ v).transpose(1, 2).reshape(B, T, DIM))
        return x + self.down(F.gelu(self.up(self.norm2(x))))


class Transformer(nn.Module):
    def __init__(self):
        super().__init__()
        self.tokens, self.positions = nn.Embedding(len(characters), DIM), nn.Embedding(CONTEXT, DIM)
        self.blocks = nn.Sequential(*(Block() for _ in range(LAYERS)))
        self.norm, self.head = nn.LayerNorm(DIM), nn.Linear(DIM, len(characters))

    def forward(self, x):
        return self.head(self.norm(self.blocks(self.tokens(x) + self.positions(torch.arange(x.shape[1])))))


torch.manual_seed(0)
model = Transformer()
optimizer = AdamOptimizer(model.parameters(), lr=1e-3)

for step in range(STEPS):
    starts = torch.randint(len(ids) - CONTEXT - 1, (BATCH,)).tolist()
    batch = torch.stack([ids[s : s + CONTEXT + 1] for s in starts])
    loss = F.cross_entropy(model(batch[:, :-1]).flatten(0, 1), batch[:, 1:].flatten())
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
    if step % 10 == 9:
        print(f"step {step + 1}: loss {loss.item():.3f}")
