"""A nanoGPT-like character model with token shift, a short convolution, a mixture of experts or packed documents."""

import argparse
from pathlib import Path

import torch
import torch.nn as nn
from torch.nn import functional as F

parser = argparse.ArgumentParser()
parser.add_argument("--mixer", default="plain", choices=["plain", "shift", "conv", "window", "experts"])
parser.add_argument("--packed", action="store_true")
parser.add_argument("--fault", default="none")
parser.add_argument("--steps", type=int, default=80)
args = parser.parse_args()
torch.manual_seed(7)
torch.set_num_threads(1)

text = (Path(__file__).parents[2] / "examples/data/tinyshakespeare.txt").read_text()[:200_000]
chars = sorted(set(text))
stoi = {c: i for i, c in enumerate(chars)}  # the newline is 0
data = torch.tensor([stoi[c] for c in text])
V, T, B, C, H, L = len(chars), 48, 16, 64, 4, 3
speeches = [torch.tensor([stoi[c] for c in s]) for s in text.split("\n\n") if 12 < len(s) < 60]


def get_batch():
    if not args.packed:
        start = torch.randint(len(data) - T - 1, (B,))
        x = torch.stack([data[i : i + T] for i in start])
        y = torch.stack([data[i + 1 : i + T + 1] for i in start])
        return x, y, None
    rows, goals, owners = [], [], []
    for _ in range(B):
        x, y, owner, n = [], [], [], 0
        while sum(map(len, x)) < T:
            piece = speeches[torch.randint(len(speeches), (1,)).item()]
            x.append(piece[:-1])
            y.append(piece[1:])
            owner.append(torch.full((len(piece) - 1,), n))
            n += 1
        rows.append(torch.cat(x)[:T])
        goals.append(torch.cat(y)[:T])
        owners.append(torch.cat(owner)[:T])
    return torch.stack(rows), torch.stack(goals), torch.stack(owners)


class Attention(nn.Module):
    def __init__(self):
        super().__init__()
        self.qkv = nn.Linear(C, 3 * C, bias=False)
        self.out = nn.Linear(C, C, bias=False)

    def forward(self, x, allowed):
        b, t, _ = x.shape
        q, k, v = self.qkv(x).view(b, t, 3, H, C // H).permute(2, 0, 3, 1, 4)
        if args.fault == "twicescale":
            q = q * (C // H) ** -0.5
        y = F.scaled_dot_product_attention(q, k, v, attn_mask=allowed)
        if args.fault == "viewmerge":
            return self.out(y.contiguous().view(b, t, C))
        return self.out(y.transpose(1, 2).reshape(b, t, C))


class TokenShift(nn.Module):
    """Mixes each position with the one before it, as RWKV does."""

    def __init__(self):
        super().__init__()
        self.mix = nn.Parameter(torch.full((C,), 0.5))

    def forward(self, x):
        if args.fault == "ahead":
            before = F.pad(x, (0, 0, -1, 1))
        elif args.fault == "rollwrap":
            before = torch.roll(x, 1, dims=1)
        else:
            before = F.pad(x, (0, 0, 1, -1))
        return x * self.mix + before * (1 - self.mix)


class ShortConv(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv = nn.Conv1d(C, C, 3, groups=C, padding=1 if args.fault == "samepad" else 0)

    def forward(self, x):
        x = x.transpose(1, 2)
        if args.fault != "samepad":
            x = F.pad(x, (2, 0))
        return F.silu(self.conv(x)).transpose(1, 2)


class Experts(nn.Module):
    def __init__(self, count=4):
        super().__init__()
        self.router = nn.Linear(C, count, bias=False)
        self.up = nn.Parameter(torch.randn(count, C, 2 * C) * 0.02)
        self.down = nn.Parameter(torch.randn(count, 2 * C, C) * 0.02)

    def forward(self, x):
        gate = self.router(x).softmax(-1)
        best, index = gate.topk(2, dim=-1)
        if args.fault == "router":
            best = torch.full_like(best, 0.5)
        else:
            best = best / best.sum(-1, keepdim=True)
        weight = torch.zeros_like(gate).scatter(-1, index, best)
        hidden = F.gelu(torch.einsum("btc,ech->bteh", x, self.up))
        return torch.einsum("bteh,ehc,bte->btc", hidden, self.down, weight)


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.ln1 = nn.LayerNorm([T, C]) if args.fault == "timenorm" else nn.LayerNorm(C)
        self.ln2 = nn.LayerNorm(C)
        self.local = {"shift": TokenShift, "conv": ShortConv}.get(args.mixer, nn.Identity)()
        self.attn = Attention()
        self.mlp = Experts() if args.mixer == "experts" else nn.Sequential(nn.Linear(C, 4 * C), nn.GELU(), nn.Linear(4 * C, C))

    def forward(self, x, allowed):
        x = x + self.attn(self.local(self.ln1(x)), allowed)
        return x + self.mlp(self.ln2(x))


class GPT(nn.Module):
    def __init__(self):
        super().__init__()
        self.wte, self.wpe = nn.Embedding(V, C), nn.Embedding(T, C)
        self.blocks = nn.ModuleList(Block() for _ in range(L))
        self.ln_f, self.head = nn.LayerNorm(C), nn.Linear(C, V, bias=False)
        self.apply(self.init)

    @staticmethod
    def init(module):
        if isinstance(module, (nn.Linear, nn.Embedding)):
            nn.init.normal_(module.weight, std=0.02)

    def forward(self, idx, targets=None, owner=None):
        t = idx.shape[1]
        allowed = torch.ones(t, t, dtype=torch.bool).tril()
        if args.mixer == "window":
            allowed = allowed & torch.ones(t, t, dtype=torch.bool).triu(-15)
        allowed = allowed[None, None]
        position = torch.arange(t).expand_as(idx)
        if owner is not None:
            first = torch.stack([torch.searchsorted(row, row) for row in owner])
            position = position - first
            same = owner[:, :, None] >= owner[:, None, :] if args.fault == "earlier" else owner[:, :, None] == owner[:, None, :]
            allowed = allowed & same[:, None]
        if args.fault == "zeropad":
            allowed = allowed & (idx != 0)[:, None, None] | torch.eye(t, dtype=torch.bool)
        x = self.wte(idx) + self.wpe(position)
        for block in self.blocks:
            x = block(x, allowed)
        logits = self.head(self.ln_f(x))
        return logits, None if targets is None else F.cross_entropy(logits.view(-1, V), targets.view(-1))


model = GPT()
decay = [p for p in model.parameters() if p.dim() > 1]
rest = [p for p in model.parameters() if p.dim() < 2]
optimizer = torch.optim.AdamW([{"params": decay, "weight_decay": 0.1}, {"params": rest, "weight_decay": 0.0}], lr=1e-3, betas=(0.9, 0.95))
for step in range(args.steps):
    for group in optimizer.param_groups:
        group["lr"] = 1e-3 * min(1, (step + 1) / 10) * (1 - 0.9 * step / args.steps)
    x, y, owner = get_batch()
    _, loss = model(x, y, owner)
    optimizer.zero_grad(set_to_none=True)
    loss.backward()
    torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    optimizer.step()
    if step % 20 == 0:
        print(f"iter {step}: loss {loss.item():.4f}")
