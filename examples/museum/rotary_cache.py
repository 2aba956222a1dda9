"""Generation with a key-value cache turns every new token by the same angle.

The rotary embedding remembered its table of angles by the length of the sequence alone: `cache_key = f'freqs:{seq_len}'`. While text is
generated beside a cache each call has one token, of another offset, and all got the table of the first. Repair: the offset is part of
the key.

Thread: https://github.com/lucidrains/rotary-embedding-torch/issues/11
Condition: generation-path-mismatch
"""

import sys
from pathlib import Path

import torch
from torch import nn
from torch.nn import functional as F

FIXED = "fixed" in sys.argv[1:]
STEPS, BATCH, CONTEXT, DIM, HEADS, LAYERS = 120, 8, 48, 32, 4, 2

text = (Path(__file__).resolve().parent.parent / "data" / "tinyshakespeare.txt").read_text()[:100_000]
characters = sorted(set(text))
ids = torch.tensor([characters.index(c) for c in text])


class RotaryEmbedding:
    def __init__(self, dim):
        self.inverse = 10_000 ** (-torch.arange(0, dim, 2) / dim)
        self.cache = {}

    def rotate_queries_or_keys(self, t, offset=0):
        length = t.shape[-2]
        key = f"freqs:{length};offset:{offset}" if FIXED else f"freqs:{length}"
        if key not in self.cache:
            angles = torch.outer(torch.arange(length) + offset, self.inverse)
            self.cache[key] = angles.cos(), angles.sin()
        cos, sin = self.cache[key]
        a, b = t.chunk(2, -1)
        return torch.cat([a * cos - b * sin, a * sin + b * cos], -1)


rotary = RotaryEmbedding(DIM // HEADS)


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(DIM), nn.LayerNorm(DIM)
        self.qkv, self.out = nn.Linear(DIM, 3 * DIM, bias=False), nn.Linear(DIM, DIM, bias=False)
        self.mlp = nn.Sequential(nn.Linear(DIM, 4 * DIM), nn.SiLU(), nn.Linear(4 * DIM, DIM))

    def forward(self, x, past):
        B, T, _ = x.shape
        q, k, v = self.qkv(self.norm1(x)).view(B, T, 3, HEADS, -1).permute(2, 0, 3, 1, 4)
        offset = past[0].shape[2] if past else 0
        q, k = rotary.rotate_queries_or_keys(q, offset), rotary.rotate_queries_or_keys(k, offset)
        if past:
            k, v = torch.cat([past[0], k], 2), torch.cat([past[1], v], 2)
        mixed = F.scaled_dot_product_attention(q, k, v, is_causal=not past)
        x = x + self.out(mixed.transpose(1, 2).reshape(B, T, DIM))
        return x + self.mlp(self.norm2(x)), (k, v)


class LanguageModel(nn.Module):
    def __init__(self):
        super().__init__()
        self.embedding = nn.Embedding(len(characters), DIM)
        self.blocks = nn.ModuleList(Block() for _ in range(LAYERS))
        self.norm, self.head = nn.LayerNorm(DIM), nn.Linear(DIM, len(characters))

    def forward(self, x, past=None):
        x, presents = self.embedding(x), []
        for number, block in enumerate(self.blocks):
            x, present = block(x, past[number] if past else None)
            presents.append(present)
        return self.head(self.norm(x)), presents


@torch.no_grad()
def sample(model, prompt, count):
    model.eval()
    tokens, (logits, past) = prompt, model(prompt)
    for _ in range(count):
        newest = torch.multinomial((logits[:, -1] / 0.8).softmax(-1), 1)
        tokens = torch.cat([tokens, newest], 1)
        logits, past = model(newest, past)
    model.train()
    return "".join(characters[i] for i in tokens[0].tolist())


torch.manual_seed(0)
model = LanguageModel()
optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)

for step in range(STEPS):
    starts = torch.randint(len(ids) - CONTEXT - 1, (BATCH,)).tolist()
    rows = torch.stack([ids[s : s + CONTEXT + 1] for s in starts])
    logits, _ = model(rows[:, :-1])
    loss = F.cross_entropy(logits.flatten(0, 1), rows[:, 1:].flatten())
    optimizer.zero_grad(set_to_none=True)
    loss.backward()
    nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    optimizer.step()
    if step % 60 == 59:
        print(f"step {step + 1}: loss {loss.item():.3f} {sample(model, ids[None, :8], 32)!r}")
