"""Gradients are clipped to norm 1 while they are still multiplied by the loss scale.

The distributed minGPT example of PyTorch trains with a GradScaler and clips before `scaler.step` without `scaler.unscale_`. The limit is
meant for the gradients; what is clipped are the gradients times the scale, so that after unscaling next to nothing of them is left.
Repair: `scaler.unscale_(optimizer)` before the clip.

Thread: https://github.com/pytorch/examples/issues/1196
Condition: clip-before-unscale
"""

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


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.ln1, self.ln2 = nn.LayerNorm(DIM), nn.LayerNorm(DIM)
        self.attn = nn.MultiheadAttention(DIM, HEADS, batch_first=True)
        self.mlp = nn.Sequential(nn.Linear(DIM, 4 * DIM), nn.GELU(), nn.Linear(4 * DIM, DIM))

    def forward(self, x):
        future = torch.ones(x.shape[1], x.shape[1], dtype=torch.bool).triu(1)
        h = self.ln1(x)
        x = x + self.attn(h, h, h, attn_mask=future, need_weights=False)[0]
        return x + self.mlp(self.ln2(x))


class GPT(nn.Module):
    def __init__(self):
        super().__init__()
        self.tok_emb, self.pos_emb = nn.Embedding(len(characters), DIM), nn.Embedding(CONTEXT, DIM)
        self.blocks = nn.Sequential(*(Block() for _ in range(LAYERS)))
        self.ln_f, self.head = nn.LayerNorm(DIM), nn.Linear(DIM, len(characters), bias=False)

    def forward(self, idx, targets):
        x = self.tok_emb(idx) + self.pos_emb(torch.arange(idx.shape[1]))
        logits = self.head(self.ln_f(self.blocks(x)))
        return logits, F.cross_entropy(logits.flatten(0, 1), targets.flatten())


class Trainer:
    def __init__(self, model):
        self.model = model
        self.optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3)
        self.scaler = torch.amp.GradScaler("cpu")

    def run_batch(self, source, targets):
        with torch.autocast("cpu", dtype=torch.float16):
            _, loss = self.model(source, targets)
        self.optimizer.zero_grad(set_to_none=True)
        self.scaler.scale(loss).backward()
        if FIXED:
            self.scaler.unscale_(self.optimizer)
        nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        self.scaler.step(self.optimizer)
        self.scaler.update()
        return loss.item()

    def train(self):
        for step in range(STEPS):
            starts = torch.randint(len(ids) - CONTEXT - 1, (BATCH,)).tolist()
            rows = torch.stack([ids[s : s + CONTEXT + 1] for s in starts])
            loss = self.run_batch(rows[:, :-1], rows[:, 1:])
            if step % 10 == 9:
                print(f"step {step + 1}: loss {loss:.3f}")


torch.manual_seed(0)
Trainer(GPT()).train()
