"""The weights are scaled twice at the start: drawn small, and multiplied by the fan rule once more.

A transformer written from scratch drew its tensors with standard deviation 0.02 and then multiplied them by sqrt(2 / width), which is
the rule for weights of standard deviation 1: 0.0035 was left at a width of 64. Signals and gradients are small from layer to layer, and
the first thousands of steps go into growing the weights. The fault itself has no public thread; in the one below a model's embedding and
output layers were scaled once too often, "making the weights in these layers very small".

Thread: https://github.com/borisdayma/dalle-mini/pull/150
Condition: poor-initialization
"""

import math
import sys
from pathlib import Path

import torch
from torch import nn
from torch.nn import functional as F

FIXED = "fixed" in sys.argv[1:]
STEPS, BATCH, CONTEXT, DIM, HEADS, LAYERS = 60, 8, 32, 64, 4, 3

text = (Path(__file__).resolve().parent.parent / "data" / "tinyshakespeare.txt").read_text()[:100_000]
characters = sorted(set(text))
ids = torch.tensor([characters.index(c) for c in text])


def new_tensor_rand(*shape):
    """A random weight."""
    return torch.randn(*shape) * 0.02


class Matrix(nn.Module):
    def __init__(self, fan_in, fan_out):
        super().__init__()
        scale = 1.0 if FIXED else math.sqrt(2 / fan_in)
        self.weight = nn.Parameter(new_tensor_rand(fan_out, fan_in) * scale)
        self.bias = nn.Parameter(torch.zeros(fan_out))

    def forward(self, x):
        return F.linear(x, self.weight, self.bias)


class Layer(nn.Module):
    def __init__(self):
        super().__init__()
        self.q, self.k, self.v, self.o = (Matrix(DIM, DIM) for _ in range(4))
        self.up, self.down = Matrix(DIM, 4 * DIM), Matrix(4 * DIM, DIM)
        self.norm1, self.norm2 = nn.LayerNorm(DIM), nn.LayerNorm(DIM)

    def forward(self, x):
        B, T, _ = x.shape
        h = self.norm1(x)
        q, k, v = (part(h).view(B, T, HEADS, -1).transpose(1, 2) for part in (self.q, self.k, self.v))
        mixed = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + self.o(mixed.transpose(1, 2).reshape(B, T, DIM))
        return x + self.down(F.gelu(self.up(self.norm2(x))))


class Transformer(nn.Module):
    def __init__(self):
        super().__init__()
        self.tokens, self.positions = nn.Parameter(new_tensor_rand(len(characters), DIM)), nn.Parameter(new_tensor_rand(CONTEXT, DIM))
        self.layers = nn.ModuleList(Layer() for _ in range(LAYERS))
        self.norm, self.head = nn.LayerNorm(DIM), Matrix(DIM, len(characters))

    def forward(self, x):
        x = self.tokens[x] + self.positions[: x.shape[1]]
        for layer in self.layers:
            x = layer(x)
        return self.head(self.norm(x))


torch.manual_seed(0)
model = Transformer()
optimizer = torch.optim.Adam(model.parameters(), lr=1e-3)

for step in range(STEPS):
    starts = torch.randint(len(ids) - CONTEXT - 1, (BATCH,)).tolist()
    rows = torch.stack([ids[s : s + CONTEXT + 1] for s in starts])
    loss = F.cross_entropy(model(rows[:, :-1]).flatten(0, 1), rows[:, 1:].flatten())
    optimizer.zero_grad()
    loss.backward()
    nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    optimizer.step()
    if step % 20 == 19:
        print(f"step {step + 1}: loss {loss.item():.3f}")
