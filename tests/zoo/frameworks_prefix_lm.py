"""Prefix language model: the prompt is read in both directions, the answer from left to right; loss on the answer only."""

import sys, torch
from torch import nn
import torch.nn.functional as F

torch.set_num_threads(1)
torch.manual_seed(9)
variant = sys.argv[1] if len(sys.argv) > 1 else "right"


class Block(nn.Module):
    def __init__(s, d, h):
        super().__init__()
        s.h = h
        s.qkv = nn.Linear(d, 3 * d)
        s.proj = nn.Linear(d, d)
        s.n1, s.n2 = nn.RMSNorm(d), nn.RMSNorm(d)
        s.up, s.gate, s.down = nn.Linear(d, 2 * d), nn.Linear(d, 2 * d), nn.Linear(2 * d, d)

    def forward(s, x, mask):
        q, k, v = (t.unflatten(-1, (s.h, -1)).transpose(1, 2) for t in s.qkv(s.n1(x)).chunk(3, -1))
        x = x + s.proj(F.scaled_dot_product_attention(q, k, v, attn_mask=mask).transpose(1, 2).flatten(2))
        y = s.n2(x)
        return x + s.down(F.silu(s.gate(y)) * s.up(y))


class PrefixLM(nn.Module):
    def __init__(s, vocab, d=48, n=24):
        super().__init__()
        s.e = nn.Embedding(vocab, d)
        s.p = nn.Embedding(n, d)
        s.blocks = nn.ModuleList(Block(d, 4) for _ in range(2))
        s.norm = nn.RMSNorm(d)
        s.head = nn.Linear(d, vocab, bias=False)

    def forward(s, ids, prefix):
        n = ids.shape[1]
        i = torch.arange(n)
        mask = i[None, :] <= i[:, None]
        if variant == "open":
            mask = torch.ones(n, n, dtype=torch.bool)
        mask = (mask[None] | (i[None, None, :] < prefix[:, None, None]))[:, None]
        x = s.e(ids) + s.p(i)
        for b in s.blocks:
            x = b(x, mask)
        return s.head(s.norm(x))


model = PrefixLM(32)
opt = torch.optim.AdamW(model.parameters(), lr=2e-3)
for it in range(60):
    half = torch.randint(3, 12, (1,)).item()
    prompt = torch.randint(1, 32, (16, half))
    ids = torch.cat([prompt, torch.zeros(16, 1, dtype=torch.long), prompt.flip(1)], 1)
    logits = model(ids[:, :-1], torch.full((16,), half + 1))
    target = ids[:, 1:].clone()
    if variant != "wholeloss":
        target[:, :half] = -100
    loss = F.cross_entropy(logits.reshape(-1, 32), target.reshape(-1), ignore_index=-100)
    opt.zero_grad()
    loss.backward()
    nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    opt.step()
    if it % 20 == 0:
        print(it, loss.item())
