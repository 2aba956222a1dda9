"""Post-norm machine: an encoder with the original recipe, or what one gets without it.

    fresh1_warm.py recipe=noam|constant lr=… layers=… opt=adam|sgd
"""
import sys
import torch
from torch import nn, Tensor

cfg = {"recipe": "noam", "lr": "1.0", "layers": "4", "opt": "adam", "steps": "220", "width": "64", "betas": "0.98", "target": "class", "scale": "1", "norm": "post"}
cfg.update(a.split("=", 1) for a in sys.argv[1:])
D, L, N = int(cfg["width"]), int(cfg["layers"]), int(cfg["steps"])
torch.manual_seed(8)


class Task:
    """Sort key: which of 16 numbers in the row comes most often (12 kinds)."""

    vocab, classes, length = 12, 12, 16

    def __iter__(self):
        while True:
            favourite = torch.randint(12, (24, 1))
            rows = torch.where(torch.rand(24, 16) < 0.3, favourite, torch.randint(12, (24, 16)))
            yield rows, torch.nn.functional.one_hot(rows, 12).sum(1).argmax(-1)


class PostNormLayer(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a = nn.MultiheadAttention(D, 4, batch_first=True)
        self.f = nn.Sequential(nn.Linear(D, 4 * D), nn.ReLU(), nn.Linear(4 * D, D))
        self.n, self.m = nn.LayerNorm(D), nn.LayerNorm(D)

    def forward(self, x: Tensor) -> Tensor:
        if cfg["norm"] == "pre":
            y = self.n(x)
            x = x + self.a(y, y, y, need_weights=False)[0]
            return x + self.f(self.m(x))
        x = self.n(x + self.a(x, x, x, need_weights=False)[0])
        return self.m(x + self.f(x))


class Encoder(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.e, self.p = nn.Embedding(12, D), nn.Parameter(torch.randn(16, D) * 0.1)
        self.stack = nn.Sequential(*[PostNormLayer() for _ in range(L)])
        self.y = nn.Linear(D, 12)
        for q in self.parameters():
            if q.dim() > 1:
                nn.init.xavier_uniform_(q)

    def forward(self, ids: Tensor) -> Tensor:
        return self.y(self.stack(self.e(ids) * D**0.5 + self.p).mean(1))


net = Encoder()
base = float(cfg["lr"])
if cfg["opt"] == "sgd":
    opt = torch.optim.SGD(net.parameters(), lr=base, momentum=0.9)
else:
    opt = torch.optim.Adam(net.parameters(), lr=base, betas=(0.9, float(cfg["betas"])), eps=1e-9)
warm = 60
rule = {
    "noam": lambda s: D**-0.5 * min((s + 1) ** -0.5, (s + 1) * warm**-1.5),
    "constant": lambda s: 1.0,
    "linear": lambda s: min(1.0, (s + 1) / warm) * max(0.0, 1 - s / N),
    "poly": lambda s: (1 - s / N) ** 2,
    "drops": lambda s: 0.1 ** sum(s >= m for m in (N * 6 // 10, N * 8 // 10)),
    "early": lambda s: 0.1 ** (s // 20),
}[cfg["recipe"]]
lrs = torch.optim.lr_scheduler.LambdaLR(opt, rule)
smooth = 0.0
for step, (x, y) in zip(range(N), Task()):
    loss = nn.functional.cross_entropy(net(x), y)
    opt.zero_grad()
    loss.backward()
    opt.step()
    lrs.step()
    smooth = 0.9 * smooth + 0.1 * loss.item()
    if step % 40 == 39:
        print(step + 1, f"{smooth:.3f} lr {lrs.get_last_lr()[0]:.2e}")
