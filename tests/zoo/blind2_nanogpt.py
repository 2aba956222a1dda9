"""Character GPT in the nanoGPT manner: memory-mapped ids, accumulation, cosine schedule, best checkpoint reloaded before sampling."""

import math
import os
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn as nn
from torch.nn import functional as F

fault = ""
block_size, batch_size, accum, max_iters, eval_interval = 48, 12, 4, 80, 20
learning_rate, min_lr, warmup_iters, grad_clip = 2e-3, 2e-4, 8, 1.0
for arg in sys.argv[1:]:
    key, _, val = arg.lstrip("-").partition("=")
    globals()[key] = type(globals()[key])(val)

torch.manual_seed(1337)
torch.set_num_threads(1)
text = (Path(__file__).parents[2] / "examples/data/tinyshakespeare.txt").read_text()
chars = sorted(set(text))
stoi = {c: i for i, c in enumerate(chars)}
out_dir = tempfile.mkdtemp()
ids = np.array([stoi[c] for c in text[:300_000]], dtype=np.uint16)
split = int(0.9 * len(ids))
ids[:split].tofile(os.path.join(out_dir, "train.bin"))
ids[split:].tofile(os.path.join(out_dir, "val.bin"))


def get_batch(part):
    data = np.memmap(os.path.join(out_dir, f"{part}.bin"), dtype=np.uint16, mode="r")
    if fault == "seeded":
        torch.manual_seed(1337)
    ix = torch.randint(len(data) - block_size, (batch_size,))
    x = torch.stack([torch.from_numpy(data[i : i + block_size].astype(np.int64)) for i in ix])
    y = torch.stack([torch.from_numpy(data[i + 1 : i + 1 + block_size].astype(np.int64)) for i in ix])
    return x, y


@dataclass
class GPTConfig:
    vocab_size: int = len(chars)
    n_layer: int = 2
    n_head: int = 4
    n_embd: int = 48
    dropout: float = 0.1


class CausalSelfAttention(nn.Module):
    def __init__(self, c):
        super().__init__()
        self.c_attn = nn.Linear(c.n_embd, 3 * c.n_embd, bias=False)
        self.c_proj = nn.Linear(c.n_embd, c.n_embd, bias=False)
        self.n_head, self.dropout = c.n_head, c.dropout
        keep = torch.tril(torch.ones(block_size, block_size))
        if fault == "strict":
            keep = torch.tril(torch.ones(block_size, block_size), diagonal=-3)
            keep.fill_diagonal_(1)
        self.register_buffer("bias", keep.view(1, 1, block_size, block_size))

    def forward(self, x):
        B, T, C = x.size()
        q, k, v = self.c_attn(x).split(C, dim=2)
        q, k, v = (t.view(B, T, self.n_head, C // self.n_head).transpose(1, 2) for t in (q, k, v))
        att = (q @ k.transpose(-2, -1)) / math.sqrt(k.size(-1))
        att = att.masked_fill(self.bias[:, :, :T, :T] == 0, float("-inf"))
        att = F.dropout(F.softmax(att, dim=-1), self.dropout, self.training)
        return self.c_proj((att @ v).transpose(1, 2).reshape(B, T, C))


class Block(nn.Module):
    def __init__(self, c):
        super().__init__()
        self.ln_1, self.attn, self.ln_2 = nn.LayerNorm(c.n_embd), CausalSelfAttention(c), nn.LayerNorm(c.n_embd)
        self.mlp = nn.Sequential(nn.Linear(c.n_embd, 4 * c.n_embd), nn.GELU(), nn.Linear(4 * c.n_embd, c.n_embd), nn.Dropout(c.dropout))

    def forward(self, x):
        x = x + self.attn(self.ln_1(x))
        return x + self.mlp(self.ln_2(x))


class GPT(nn.Module):
    def __init__(self, c):
        super().__init__()
        self.wte, self.wpe = nn.Embedding(c.vocab_size, c.n_embd), nn.Embedding(block_size, c.n_embd)
        self.drop = nn.Dropout(c.dropout)
        self.h = nn.ModuleList([Block(c) for _ in range(c.n_layer)])
        self.ln_f = nn.LayerNorm(c.n_embd)
        self.lm_head = nn.Linear(c.n_embd, c.vocab_size, bias=False)
        self.wte.weight = self.lm_head.weight
        self.apply(self._init)

    def _init(self, m):
        if isinstance(m, (nn.Linear, nn.Embedding)):
            nn.init.normal_(m.weight, 0.0, 0.02)
            if getattr(m, "bias", None) is not None:
                nn.init.zeros_(m.bias)

    def forward(self, idx, targets=None):
        x = self.drop(self.wte(idx) + self.wpe(torch.arange(idx.size(1))))
        for b in self.h:
            x = b(x)
        x = self.ln_f(x)
        if targets is None:
            return self.lm_head(x[:, [-1], :]), None
        logits = self.lm_head(x)
        return logits, F.cross_entropy(logits.view(-1, logits.size(-1)), targets.view(-1), ignore_index=-1)

    @torch.no_grad()
    def generate(self, idx, n, temperature=0.9, top_k=20):
        for _ in range(n):
            logits, _ = self(idx[:, -block_size:])
            logits = logits[:, -1, :] / temperature
            v, _ = torch.topk(logits, top_k)
            logits[logits < v[:, [-1]]] = -float("inf")
            idx = torch.cat((idx, torch.multinomial(F.softmax(logits, dim=-1), 1)), dim=1)
        return idx


model = GPT(GPTConfig())
optimizer = torch.optim.AdamW(
    [
        {"params": [p for p in model.parameters() if p.dim() >= 2], "weight_decay": 0.1},
        {"params": [p for p in model.parameters() if p.dim() < 2], "weight_decay": 0.0},
    ],
    lr=learning_rate,
    betas=(0.9, 0.95),
)


@torch.no_grad()
def estimate_loss():
    if fault != "noeval":
        model.eval()
    out = {}
    for part in ("train", "val"):
        out[part] = torch.stack([model(*get_batch(part))[1] for _ in range(5)]).mean().item()
    if fault != "stuck":
        model.train()
    return out


def get_lr(it):
    if it < warmup_iters:
        return learning_rate * (it + 1) / (warmup_iters + 1)
    ratio = min(1.0, (it - warmup_iters) / (max_iters - warmup_iters))
    return min_lr + 0.5 * (1 + math.cos(math.pi * ratio)) * (learning_rate - min_lr)


best, losses = 1e9, []
X, Y = get_batch("train")
for it in range(max_iters):
    for group in optimizer.param_groups:
        group["lr"] = get_lr(it)
    if it % eval_interval == 0:
        found = estimate_loss()
        print(f"step {it}: train {found['train']:.4f} val {found['val']:.4f}")
        if found["val"] < best:
            best = found["val"]
            torch.save({"model": model.state_dict(), "optimizer": optimizer.state_dict(), "iter": it}, os.path.join(out_dir, "ckpt.pt"))
    for _micro in range(accum):
        _, loss = model(X, Y)
        if fault != "nodivide":
            loss = loss / accum
        X, Y = get_batch("train")
        loss.backward()
    torch.nn.utils.clip_grad_norm_(model.parameters(), grad_clip)
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    losses.append(loss.item())
model.load_state_dict(torch.load(os.path.join(out_dir, "ckpt.pt"))["model"])
model.eval()
print("".join(chars[i] for i in model.generate(torch.zeros((1, 1), dtype=torch.long), 60)[0].tolist()))
