"""Fine-tuning in pure bfloat16 hardly converges: most updates are smaller than the distance to the next number.

A pretrained model was loaded in bfloat16, weights included, and fine-tuned with a small learning rate. In float32 the same recipe
converged well, in bfloat16 very badly. Next to a weight w the numbers are w/256 to w/128 apart; an update below half of that is rounded
away, at every step anew. Repair: keep the weights in float32 and compute in bfloat16 by autocast.

Thread: https://github.com/meta-pytorch/torchtune/issues/2254
Thread: https://github.com/pytorch/ao/pull/1124
Condition: low-precision-update-lost
"""

import sys
from pathlib import Path

import torch
from torch import nn
from torch.nn import functional as F

FIXED = "fixed" in sys.argv[1:]
PRETRAINING, FINE_TUNING, BATCH, CONTEXT, DIM, HEADS, LAYERS = 100, 60, 8, 32, 48, 4, 2

text = (Path(__file__).resolve().parent.parent / "data" / "tinyshakespeare.txt").read_text()[:50_000]
characters = sorted(set(text + text.upper()))
index = {character: number for number, character in enumerate(characters)}


def encode(words):
    return torch.tensor([index[character] for character in words])


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.norm1, self.norm2 = nn.RMSNorm(DIM), nn.RMSNorm(DIM)
        self.qkv, self.out = nn.Linear(DIM, 3 * DIM, bias=False), nn.Linear(DIM, DIM, bias=False)
        self.gate, self.up = nn.Linear(DIM, 2 * DIM, bias=False), nn.Linear(DIM, 2 * DIM, bias=False)
        self.down = nn.Linear(2 * DIM, DIM, bias=False)

    def forward(self, x):
        B, T, _ = x.shape
        q, k, v = self.qkv(self.norm1(x)).view(B, T, 3, HEADS, -1).permute(2, 0, 3, 1, 4)
        x = x + self.out(F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2).reshape(B, T, DIM))
        h = self.norm2(x)
        return x + self.down(F.silu(self.gate(h)) * self.up(h))


class LanguageModel(nn.Module):
    def __init__(self):
        super().__init__()
        self.tokens, self.positions = nn.Embedding(len(characters), DIM), nn.Embedding(CONTEXT, DIM)
        self.blocks = nn.Sequential(*(Block() for _ in range(LAYERS)))
        self.norm, self.output = nn.RMSNorm(DIM), nn.Linear(DIM, len(characters), bias=False)

    def forward(self, x):
        return self.output(self.norm(self.blocks(self.tokens(x) + self.positions(torch.arange(x.shape[1])))))


def get_batch(ids):
    starts = torch.randint(len(ids) - CONTEXT - 1, (BATCH,)).tolist()
    rows = torch.stack([ids[s : s + CONTEXT + 1] for s in starts])
    return rows[:, :-1], rows[:, 1:]


def pretrained():
    """The model as somebody left it: trained in float32, on the plays as they are printed."""
    model = LanguageModel()
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    plays = encode(text)
    for _ in range(PRETRAINING):
        tokens, labels = get_batch(plays)
        loss = F.cross_entropy(model(tokens).flatten(0, 1), labels.flatten())
        loss.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
    return model


torch.manual_seed(0)
model = pretrained()
if not FIXED:
    model = model.to(torch.bfloat16)
optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4)
dialogue = encode(text.upper())

for step in range(FINE_TUNING):
    tokens, labels = get_batch(dialogue)
    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=FIXED):
        logits = model(tokens)
    loss = F.cross_entropy(logits.float().flatten(0, 1), labels.flatten())
    loss.backward()
    nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    if step % 20 == 19:
        print(f"step {step + 1}: loss {loss.item():.3f}")
