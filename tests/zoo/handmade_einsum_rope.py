import os
import sys
from dataclasses import dataclass

import torch
from torch import nn
import torch.nn.functional as F

torch.set_num_threads(1)
torch.manual_seed(3)
MODE = sys.argv[1] if len(sys.argv) > 1 else "ok"


@dataclass
class Cfg:
    d: int = 64
    h: int = 4
    kv: int = 1
    layers: int = 4
    V: int = 96
    T: int = 48
    window: int = 16
    tie_embeddings: bool = True


class RMS(nn.Module):
    def __init__(self, d):
        super().__init__()
        self.g = nn.Parameter(torch.ones(d))

    def forward(self, x):
        return self.g * x * (x.pow(2).mean(-1, keepdim=True) + 1e-6).rsqrt()


def rope(x):  # b t h e
    b, t, h, e = x.shape
    freqs = 10000 ** (-torch.arange(0, e, 2).float() / e)
    ang = torch.arange(t)[:, None] * freqs[None]
    c, s = ang.cos()[None, :, None], ang.sin()[None, :, None]
    a, b_ = x[..., 0::2], x[..., 1::2]
    return torch.stack([a * c - b_ * s, a * s + b_ * c], -1).flatten(-2)


class MQA(nn.Module):
    """Multi-query attention with einsum, rotary embedding and a sliding window."""

    def __init__(self, c, windowed):
        super().__init__()
        self.c, self.windowed = c, windowed
        e = c.d // c.h
        self.wq = nn.Parameter(torch.randn(c.d, c.h, e) * 0.02)
        self.wk = nn.Parameter(torch.randn(c.d, e) * 0.02)
        self.wv = nn.Parameter(torch.randn(c.d, e) * 0.02)
        self.wo = nn.Parameter(torch.randn(c.h, e, c.d) * 0.02)

    def forward(self, x):
        b, t, _ = x.shape
        q = rope(torch.einsum("btd,dhe->bthe", x, self.wq))
        k = rope(torch.einsum("btd,de->bte", x, self.wk)[:, :, None])[:, :, 0]
        v = torch.einsum("btd,de->bte", x, self.wv)
        e = q.shape[-1]
        if MODE == "sqrtd":
            q = q / self.c.d**0.5
        elif MODE != "unscaled":
            q = q / e**0.5
        s = torch.einsum("bqhe,bke->bhqk", q, k)
        i, j = torch.arange(t)[:, None], torch.arange(t)[None]
        keep = j <= i
        if MODE == "leak" and not self.windowed:
            keep = j <= i + 1
        if MODE == "blind":
            keep = j == i
        if self.windowed:
            keep = keep & (i - j < self.c.window)
        s = s + torch.where(keep, 0.0, -1e9)
        p = s.softmax(-1)
        return torch.einsum("bhqk,bke,hed->bqd", p, v, self.wo)


class SwiGLU(nn.Module):
    def __init__(self, d):
        super().__init__()
        self.a, self.b, self.o = nn.Linear(d, 2 * d, False), nn.Linear(d, 2 * d, False), nn.Linear(2 * d, d, False)

    def forward(self, x):
        return self.o(F.silu(self.a(x)) * self.b(x))


class Net(nn.Module):
    def __init__(self, c):
        super().__init__()
        self.cfg = c
        self.emb = nn.Embedding(c.V, c.d)
        nn.init.normal_(self.emb.weight, std=0.02)
        self.att = nn.ModuleList(MQA(c, i % 2 == 0) for i in range(c.layers))
        self.mlp = nn.ModuleList(SwiGLU(c.d) for _ in range(c.layers))
        norm = nn.Identity if MODE == "nonorm" else lambda: RMS(c.d)
        self.n1 = nn.ModuleList(norm() for _ in range(c.layers))
        self.n2 = nn.ModuleList(norm() for _ in range(c.layers))
        self.nf = norm()
        self.head = nn.Linear(c.d, c.V, bias=False)
        if MODE == "untied":
            self.head.weight.data = self.emb.weight.data.clone()
        elif c.tie_embeddings:
            self.head.weight = self.emb.weight

    def forward(self, ids):
        x = self.emb(ids)
        for a, m, n1, n2 in zip(self.att, self.mlp, self.n1, self.n2):
            x = x + a(n1(x))
            x = x + m(n2(x))
        return self.head(self.nf(x))


raw = open(os.path.join(os.path.dirname(os.path.abspath(__file__)), "../../examples/data/tinyshakespeare.txt"), "rb").read()[:100000]
corpus = torch.tensor([min(95, max(0, b - 32)) for b in raw])
cfg = Cfg()
net = Net(cfg)
decay = [p for p in net.parameters() if p.dim() > 1]
flat = [p for p in net.parameters() if p.dim() <= 1]
groups = [{"params": decay, "weight_decay": 0.1, "lr": 2e-3}, {"params": flat, "weight_decay": 0.0, "lr": 1e-3}]
if MODE == "nonorm" :
    groups = [{"params": decay, "lr": 2e-3}]
opt = torch.optim.AdamW(groups, betas=(0.9, 0.95))
sched = torch.optim.lr_scheduler.CosineAnnealingWarmRestarts(opt, T_0=20)
accum = 3
for step in range(50):
    opt.zero_grad()
    for micro in range(accum):
        at = torch.randint(0, len(corpus) - cfg.T - 1, (6,)).tolist()
        chunk = torch.stack([corpus[a : a + cfg.T + 1] for a in at])
        out = net(chunk[:, :-1])
        loss = F.cross_entropy(out.transpose(1, 2), chunk[:, 1:])
        if MODE == "sumaccum":
            loss.backward()
        elif MODE == "twicediv":
            (loss / accum / accum).backward()
        else:
            (loss / accum).backward()
    nn.utils.clip_grad_norm_(net.parameters(), 1.0)
    opt.step()
    sched.step()
    if step % 10 == 0:
        print(step, round(loss.item(), 4))
sys.exit(0)
