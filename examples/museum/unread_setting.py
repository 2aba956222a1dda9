"""Settings that nothing reads: rotary positions and dropout are switched on, and the model is the same to the last bit.

A transformer written from scratch had `--use-rope`, `--use-swiglu` and `--use-rmsnorm`; its training path read none of them. TabDPT was
reported for its dropout: the constructor takes the value and never hands it on, so that the layers run with the default. Whoever compares
settings compares noise. Repair: pass them on.

    sickbay checkup examples/museum/unread_setting.py:sick

Thread: https://github.com/layer6ai-labs/TabDPT-inference/issues/4
Condition: setting-without-effect
Checkup: sick, fixed
"""

import sys
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import nn
from torch.nn import functional as F

STEPS, BATCH, CONTEXT = 30, 8, 32

text = (Path(__file__).resolve().parent.parent / "data" / "tinyshakespeare.txt").read_text()[:50_000]
characters = sorted(set(text))
ids = torch.tensor([characters.index(c) for c in text])


@dataclass
class Config:
    dim: int = 32
    num_heads: int = 4
    num_layers: int = 2
    dropout: float = 0.1
    use_rope: bool = True


def rotate(t):
    half = t.shape[-1] // 2
    angles = torch.outer(torch.arange(t.shape[-2]), 10_000 ** (-torch.arange(half) / half))
    a, b = t.chunk(2, -1)
    return torch.cat([a * angles.cos() - b * angles.sin(), a * angles.sin() + b * angles.cos()], -1)


class Layer(nn.Module):
    def __init__(self, config, dropout=0.0, use_rope=False):
        super().__init__()
        dim = config.dim
        self.num_heads, self.use_rope = config.num_heads, use_rope
        self.norm1, self.norm2 = nn.LayerNorm(dim), nn.LayerNorm(dim)
        self.qkv, self.out = nn.Linear(dim, 3 * dim), nn.Linear(dim, dim)
        self.mlp = nn.Sequential(nn.Linear(dim, 4 * dim), nn.GELU(), nn.Linear(4 * dim, dim))
        self.dropout = nn.Dropout(dropout)

    def forward(self, x):
        B, T, D = x.shape
        q, k, v = self.qkv(self.norm1(x)).view(B, T, 3, self.num_heads, -1).permute(2, 0, 3, 1, 4)
        if self.use_rope:
            q, k = rotate(q), rotate(k)
        x = x + self.dropout(self.out(F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2).reshape(B, T, D)))
        return x + self.dropout(self.mlp(self.norm2(x)))


class Transformer(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.config = config
        self.embedding = nn.Embedding(len(characters), config.dim)
        self.layers = nn.ModuleList(self.layer(config) for _ in range(config.num_layers))
        self.norm, self.head = nn.LayerNorm(config.dim), nn.Linear(config.dim, len(characters))

    def layer(self, config):
        return Layer(config)

    def forward(self, x):
        x = self.embedding(x)
        for layer in self.layers:
            x = layer(x)
        return self.head(self.norm(x))


class FixedTransformer(Transformer):
    def layer(self, config):
        return Layer(config, config.dropout, config.use_rope)


def batches():
    generator = torch.Generator().manual_seed(0)
    while True:
        starts = torch.randint(len(ids) - CONTEXT - 1, (BATCH,), generator=generator).tolist()
        rows = torch.stack([ids[s : s + CONTEXT + 1] for s in starts])
        yield rows[:, :-1], rows[:, 1:]


def cross_entropy(logits, targets):
    return F.cross_entropy(logits.flatten(0, 1), targets.flatten())


def sick():
    torch.manual_seed(0)
    return Transformer(Config()), batches(), cross_entropy


def fixed():
    torch.manual_seed(0)
    return FixedTransformer(Config()), batches(), cross_entropy


if __name__ == "__main__":
    model, data, loss_function = fixed() if "fixed" in sys.argv[1:] else sick()
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3)
    for step in range(STEPS):
        x, y = next(data)
        loss = loss_function(model(x), y)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        if step % 10 == 9:
            print(f"step {step + 1}: loss {loss.item():.3f}")
