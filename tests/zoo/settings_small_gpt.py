"""A small GPT built from a configuration object; in some variants a part of it is never read."""
import argparse
import math
from dataclasses import dataclass
from types import SimpleNamespace

import torch
import torch.nn as nn
import torch.nn.functional as F


@dataclass
class GPTConfig:
    vocab_size: int = 40
    block_size: int = 16
    n_layer: int = 2
    n_head: int = 4
    n_embd: int = 32
    dropout: float = 0.1
    use_rope: bool = True
    learning_rate: float = 1e-3
    batch_size: int = 16


def rotate(x):
    half = x.shape[-1] // 2
    angle = torch.arange(x.shape[-2])[:, None] * 100.0 ** (-torch.arange(half) / half)
    a, b = x[..., :half], x[..., half:]
    return torch.cat([a * angle.cos() - b * angle.sin(), a * angle.sin() + b * angle.cos()], -1)


class Block(nn.Module):
    def __init__(self, c, fault):
        super().__init__()
        self.heads = 2 if fault == "heads" else c.n_head
        self.rope = False if fault == "rope" else c.use_rope
        self.ln1, self.ln2 = nn.LayerNorm(c.n_embd), nn.LayerNorm(c.n_embd)
        self.qkv, self.proj = nn.Linear(c.n_embd, 3 * c.n_embd), nn.Linear(c.n_embd, c.n_embd)
        self.mlp = nn.Sequential(nn.Linear(c.n_embd, 64), nn.GELU(), nn.Linear(64, c.n_embd))
        self.drop = nn.Dropout(0.1 if fault == "dropout" else c.dropout)

    def forward(self, x):
        B, T, C = x.shape
        q, k, v = (t.view(B, T, self.heads, -1).transpose(1, 2) for t in self.qkv(self.ln1(x)).chunk(3, -1))
        if self.rope:
            q, k = rotate(q), rotate(k)
        att = q @ k.transpose(-2, -1) / math.sqrt(q.shape[-1])
        att = att.masked_fill(torch.ones(T, T).triu(1).bool(), float("-inf")).softmax(-1)
        x = x + self.drop(self.proj((att @ v).transpose(1, 2).reshape(B, T, C)))
        return x + self.drop(self.mlp(self.ln2(x)))


class GPT(nn.Module):
    def __init__(self, config, fault=""):
        super().__init__()
        self.config = config
        self.wte, self.wpe = nn.Embedding(config.vocab_size, config.n_embd), nn.Embedding(config.block_size, config.n_embd)
        self.blocks = nn.ModuleList(Block(config, fault or getattr(type(self), "fault", "")) for _ in range(config.n_layer))
        self.ln = nn.LayerNorm(config.n_embd)
        self.head = nn.Linear(config.n_embd, config.vocab_size)

    def forward(self, idx):
        x = self.wte(idx) + self.wpe(torch.arange(idx.shape[1]))
        for block in self.blocks:
            x = block(x)
        return self.head(self.ln(x))


parser = argparse.ArgumentParser()
parser.add_argument("--fault", default="")
parser.add_argument("--namespace", action="store_true")
parser.add_argument("--off", action="store_true")
args = parser.parse_args()
GPT.fault = args.fault
config = GPTConfig(dropout=0.0, use_rope=False) if args.off else GPTConfig()
torch.manual_seed(0)
model = GPT(SimpleNamespace(**vars(config)) if args.namespace else config)
opt = torch.optim.AdamW(model.parameters(), lr=config.learning_rate)
for it in range(25):
    start = torch.randint(40, (config.batch_size, 1))
    ids = (start + torch.randint(1, 4, (config.batch_size, 1)) * torch.arange(17)) % 40
    loss = F.cross_entropy(model(ids[:, :-1]).flatten(0, 1), ids[:, 1:].flatten())
    opt.zero_grad()
    loss.backward()
    nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    opt.step()
    if it % 8 == 0:
        print(it, round(loss.item(), 4))
