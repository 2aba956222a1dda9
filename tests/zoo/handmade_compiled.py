"""One small decoder, trained in the ways people switch on: compile, bf16, float64, checkpointing, autocast."""
import argparse
import contextlib

import torch
import torch.nn as nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

p = argparse.ArgumentParser()
p.add_argument("--how", default="plain", choices=["plain", "compile", "inplace", "stepfn", "ckpt", "bf16", "double", "amp"])
p.add_argument("--ill", default="")
p.add_argument("--steps", type=int, default=40)
cfg = p.parse_args()
torch.manual_seed(12)
torch.set_num_threads(1)


class Mix(nn.Module):
    def __init__(self, d):
        super().__init__()
        self.ln = nn.LayerNorm(d)
        self.q, self.k, self.v, self.o = (nn.Linear(d, d) for _ in range(4))
        self.ff = nn.Sequential(nn.LayerNorm(d), nn.Linear(d, 3 * d), nn.GELU(approximate="tanh"), nn.Linear(3 * d, d))

    def forward(self, x):
        b, t, d = x.shape
        h = self.ln(x)
        q, k, v = (f(h).reshape(b, t, 4, d // 4).transpose(1, 2) for f in (self.q, self.k, self.v))
        x = x + self.o(F.scaled_dot_product_attention(q, k, v, is_causal=cfg.ill != "leak").transpose(1, 2).reshape(b, t, d))
        if cfg.ill == "expo":
            x = x + torch.log(self.ff(x).exp() - 1.0).nan_to_num(0.0, 0.0, 0.0) * 0
        return x + self.ff(x)


class Dec(nn.Module):
    def __init__(self, v=50, d=32):
        super().__init__()
        self.e, self.p = nn.Embedding(v, d), nn.Embedding(32, d)
        self.m = nn.ModuleList([Mix(d), Mix(d)])
        self.n, self.h = nn.LayerNorm(d), nn.Linear(d, v)
        if cfg.ill == "frozenhead":
            self.h.requires_grad_(False)

    def forward(self, x):
        z = self.e(x) + self.p(torch.arange(x.shape[1]))
        for m in self.m:
            if cfg.ill == "detach" and m is self.m[1]:
                z = z.detach()
            z = checkpoint(m, z, use_reentrant=False) if cfg.how == "ckpt" else m(z)
        return self.h(self.n(z))


net = Dec()
if cfg.how == "bf16":
    net = net.to(torch.bfloat16)
if cfg.how == "double":
    net = net.double()
if cfg.how == "inplace":
    net.compile(backend="eager")
fwd = torch.compile(net, backend="aot_eager") if cfg.how == "compile" else net
opt = torch.optim.AdamW(filter(lambda q: q.requires_grad, net.parameters()), lr=4.0 if cfg.ill == "lr" else 1e-3)


def step(x, y):
    loss = F.cross_entropy(fwd(x).float().flatten(0, 1), y.flatten())
    loss.backward()
    return loss


run = torch.compile(step, backend="eager") if cfg.how == "stepfn" else step
ctx = torch.autocast("cpu", dtype=torch.bfloat16) if cfg.how == "amp" else contextlib.nullcontext()
for i in range(cfg.steps):
    s = (torch.randint(50, (8, 1)) + torch.randint(1, 6, (8, 1)) * torch.arange(25)) % 50
    opt.zero_grad()
    with ctx:
        loss = run(s[:, :-1], s[:, 1:])
    opt.step()
print(float(loss))
