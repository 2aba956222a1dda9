"""Sequence mixers without attention: a gated linear scan, causal convolutions, linear attention."""
import sys
import torch
import torch.nn as nn
import torch.nn.functional as F
from torch.utils.checkpoint import checkpoint

torch.set_num_threads(1)
torch.manual_seed(6)
mixer, problem = (sys.argv[1:] + ["scan", ""])[:2] if len(sys.argv) < 3 else sys.argv[1:3]


class Scan(nn.Module):
    def __init__(self, d):
        super().__init__()
        self.i, self.g, self.o = nn.Linear(d, d), nn.Linear(d, d), nn.Linear(d, d)
        self.a = nn.Parameter(torch.linspace(0.5, 3.0, d))

    def forward(self, x):
        u, decay = self.i(x), torch.sigmoid(self.a)
        if problem == "unstable":
            decay = 1.0 + 4 * decay
        h, out = torch.zeros_like(u[:, 0]), []
        for t in range(x.shape[1]):
            h = decay * h + (1 - decay) * u[:, t]
            out.append(h)
        return self.o(torch.stack(out, 1) * F.silu(self.g(x)))


class Conv(nn.Module):
    def __init__(self, d, k=5):
        super().__init__()
        self.k, self.c, self.p = k, nn.Conv1d(d, d, k, groups=d), nn.Linear(d, d)

    def forward(self, x):
        pad = (self.k // 2, self.k // 2) if problem == "same" else (self.k - 1, 0)
        return self.p(F.gelu(self.c(F.pad(x.transpose(1, 2), pad)).transpose(1, 2)))


class LinAtt(nn.Module):
    def __init__(self, d):
        super().__init__()
        self.qkv, self.o = nn.Linear(d, 3 * d), nn.Linear(d, d)

    def forward(self, x):
        q, k, v = self.qkv(x).chunk(3, -1)
        q, k = F.elu(q) + 1, F.elu(k) + 1
        if problem == "noncausal":
            kv, z = (k.unsqueeze(-1) * v.unsqueeze(-2)).sum(1, True), k.sum(1, True)
        else:
            kv, z = (k.unsqueeze(-1) * v.unsqueeze(-2)).cumsum(1), k.cumsum(1)
        y = torch.einsum("btd,btde->bte", q, kv.expand(-1, x.shape[1], -1, -1))
        return self.o(y / ((q * z).sum(-1, keepdim=True) + 1e-6))


class Model(nn.Module):
    def __init__(self, V=64, d=32, L=3):
        super().__init__()
        make = {"scan": Scan, "conv": Conv, "linear": LinAtt}[mixer]
        self.e = nn.Embedding(V, d)
        self.mix = nn.ModuleList(make(d) for _ in range(L))
        self.mlp = nn.ModuleList(nn.Sequential(nn.LayerNorm(d), nn.Linear(d, 2 * d), nn.GELU(), nn.Linear(2 * d, d)) for _ in range(L))
        self.norms = nn.ModuleList(nn.LayerNorm(d) for _ in range(L))
        self.out = nn.Linear(d, V)

    def forward(self, s):
        x = self.e(s)
        for n, m, f in zip(self.norms, self.mix, self.mlp):
            x = x + checkpoint(m, n(x), use_reentrant=False)
            x = x + f(x)
        return self.out(x)


net = Model()
opt = torch.optim.NAdam(net.parameters(), lr=2e-3)
for i in range(40):
    T = 12 + 4 * (i // 10)  # longer and longer
    a, b = torch.randint(64, (2, 16, 1))
    s = (a + (b % 7 + 1) * torch.arange(T + 1)) % 64
    loss = F.cross_entropy(net(s[:, :-1]).flatten(0, 1), s[:, 1:].flatten())
    loss.backward()
    opt.step()
    opt.zero_grad()
    if i % 10 == 0:
        print(T, loss.item())
