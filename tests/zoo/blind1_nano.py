"""Trains a character GPT on a play, samples now and then."""
import argparse
import math
import os
from contextlib import nullcontext

import torch
import torch.nn as nn
from torch.nn import functional as F

ap = argparse.ArgumentParser()
ap.add_argument("--max_iters", type=int, default=160)
ap.add_argument("--learning_rate", type=float, default=2e-3)
ap.add_argument("--min_lr", type=float, default=2e-4)
ap.add_argument("--warmup_iters", type=int, default=10)
ap.add_argument("--lr_decay_iters", type=int, default=0)
ap.add_argument("--decay", default="clamped")
ap.add_argument("--dtype", default="float32")
ap.add_argument("--pure", action="store_true")
ap.add_argument("--init_std", type=float, default=0.02)
ap.add_argument("--softcap", type=float, default=0.0)
ap.add_argument("--grad_clip", type=float, default=1.0)
ap.add_argument("--beta2", type=float, default=0.99)
ap.add_argument("--n_embd", type=int, default=64)
ap.add_argument("--n_layer", type=int, default=2)
ap.add_argument("--bias", action="store_true")
ap.add_argument("--attn", default="sdpa")
ap.add_argument("--zero_head", action="store_true")
ap.add_argument("--final", type=float, default=-1.0, help="write a sample of 250 characters at the end with this temperature")
ap.add_argument("--top_k", type=int, default=0)
cfg = ap.parse_args()

# -----------------------------------------------------------------------------
torch.manual_seed(1337)
here = os.path.dirname(os.path.abspath(__file__))
text = open(os.path.join(here, "../../examples/data/tinyshakespeare.txt")).read()[:200000]
chars = sorted(set(text))
stoi = {c: i for i, c in enumerate(chars)}
itos = {i: c for c, i in stoi.items()}
ids = torch.tensor([stoi[c] for c in text])
train_data, val_data = ids[: int(0.9 * len(ids))], ids[int(0.9 * len(ids)) :]
block_size, batch_size, n_head = 48, 16, 2


def get_batch(split):
    data = train_data if split == "train" else val_data
    ix = torch.randint(len(data) - block_size - 1, (batch_size,))
    x = torch.stack([data[i : i + block_size] for i in ix])
    y = torch.stack([data[i + 1 : i + 1 + block_size] for i in ix])
    return x, y


class CausalSelfAttention(nn.Module):
    def __init__(self, c):
        super().__init__()
        self.c_attn = nn.Linear(c, 3 * c, bias=cfg.bias)
        self.c_proj = nn.Linear(c, c, bias=cfg.bias)
        self.register_buffer("mask", torch.tril(torch.ones(block_size, block_size)).view(1, 1, block_size, block_size))

    def forward(self, x):
        B, T, C = x.size()
        q, k, v = (t.view(B, T, n_head, C // n_head).transpose(1, 2) for t in self.c_attn(x).split(C, dim=2))
        if cfg.attn == "sdpa":
            y = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        else:
            att = q @ k.transpose(-2, -1)
            if cfg.attn == "full":
                att = att / math.sqrt(C // n_head)
            elif cfg.attn == "seq":
                att = att / T
            elif cfg.attn == "times":
                att = att * math.sqrt(C // n_head)
            att = att.masked_fill(self.mask[:, :, :T, :T] == 0, float("-inf"))
            y = F.softmax(att, dim=-1) @ v
        return self.c_proj(y.transpose(1, 2).reshape(B, T, C))


class Block(nn.Module):
    def __init__(self, c):
        super().__init__()
        self.ln_1, self.ln_2 = nn.LayerNorm(c), nn.LayerNorm(c)
        self.attn = CausalSelfAttention(c)
        self.mlp = nn.Sequential(nn.Linear(c, 4 * c, bias=cfg.bias), nn.GELU(), nn.Linear(4 * c, c, bias=cfg.bias))

    def forward(self, x):
        x = x + self.attn(self.ln_1(x))
        return x + self.mlp(self.ln_2(x))


class GPT(nn.Module):
    def __init__(self):
        super().__init__()
        c = cfg.n_embd
        self.wte, self.wpe = nn.Embedding(len(chars), c), nn.Embedding(block_size, c)
        self.h = nn.ModuleList([Block(c) for _ in range(cfg.n_layer)])
        self.ln_f = nn.LayerNorm(c)
        self.lm_head = nn.Linear(c, len(chars), bias=False)
        if not cfg.zero_head:
            self.wte.weight = self.lm_head.weight
        self.apply(self._init)
        if cfg.zero_head:
            nn.init.zeros_(self.lm_head.weight)

    def _init(self, m):
        if isinstance(m, (nn.Linear, nn.Embedding)):
            nn.init.normal_(m.weight, 0.0, cfg.init_std)

    def forward(self, idx, targets=None):
        x = self.wte(idx) + self.wpe(torch.arange(idx.size(1)))
        for b in self.h:
            x = b(x)
        logits = self.lm_head(self.ln_f(x))
        if cfg.softcap:
            logits = cfg.softcap * torch.tanh(logits / cfg.softcap)
        loss = None if targets is None else F.cross_entropy(logits.float().view(-1, logits.size(-1)), targets.view(-1))
        return logits, loss

    @torch.no_grad()
    def generate(self, idx, n, temperature=1.0, top_k=0):
        for _ in range(n):
            logits, _ = self(idx[:, -block_size:])
            logits = logits[:, -1].float()
            if temperature == 0:
                nxt = logits.argmax(-1, keepdim=True)
            else:
                logits = logits / temperature
                if top_k:
                    v, _ = torch.topk(logits, top_k)
                    logits[logits < v[:, [-1]]] = -float("inf")
                nxt = torch.multinomial(F.softmax(logits, -1), 1)
            idx = torch.cat((idx, nxt), 1)
        return idx


model = GPT()
if cfg.pure:
    model = model.to(torch.bfloat16)
decay = [p for p in model.parameters() if p.dim() >= 2]
nodecay = [p for p in model.parameters() if p.dim() < 2]
optimizer = torch.optim.AdamW([{"params": decay, "weight_decay": 0.1}, {"params": nodecay, "weight_decay": 0.0}],
                              lr=cfg.learning_rate, betas=(0.9, cfg.beta2))
ctx = torch.autocast("cpu", torch.bfloat16) if cfg.dtype == "bfloat16" else nullcontext()
horizon = cfg.lr_decay_iters or cfg.max_iters


def get_lr(it):
    if cfg.decay == "none":
        return cfg.learning_rate
    if it < cfg.warmup_iters:
        return cfg.learning_rate * (it + 1) / (cfg.warmup_iters + 1)
    if cfg.decay == "clamped" and it > horizon:
        return cfg.min_lr
    r = (it - cfg.warmup_iters) / (horizon - cfg.warmup_iters)
    return cfg.min_lr + 0.5 * (1 + math.cos(math.pi * r)) * (cfg.learning_rate - cfg.min_lr)


@torch.no_grad()
def estimate_loss():
    out = {}
    model.eval()
    for split in ("train", "val"):
        losses = torch.zeros(4)
        for k in range(4):
            with ctx:
                losses[k] = model(*get_batch(split))[1].item()
        out[split] = losses.mean()
    model.train()
    return out


for it in range(cfg.max_iters):
    for g in optimizer.param_groups:
        g["lr"] = get_lr(it)
    if it % 40 == 0:
        l = estimate_loss()
        print(f"step {it}: train {l['train']:.3f} val {l['val']:.3f}")
    if it and it % 50 == 0:
        print("".join(itos[i] for i in model.generate(torch.zeros(1, 1, dtype=torch.long), 30, 0)[0].tolist()))
    with ctx:
        _, loss = model(*get_batch("train"))
    loss.backward()
    if cfg.grad_clip:
        torch.nn.utils.clip_grad_norm_(model.parameters(), cfg.grad_clip)
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    if it % 20 == 0:
        print(f"iter {it} loss {loss.item():.4f}")
if cfg.final >= 0:
    model.eval()
    print("".join(itos[i] for i in model.generate(torch.zeros(1, 1, dtype=torch.long), 250, cfg.final, cfg.top_k)[0].tolist()))
print("final", loss.item())
