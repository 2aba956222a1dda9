"""Regression on tables and series with a transformer over the columns."""
import argparse
import numpy as np
import torch
import torch.nn as nn

cli = argparse.ArgumentParser()
cli.add_argument("--y", default="norm")  # norm, raw
cli.add_argument("--x", default="norm")
cli.add_argument("--head", default="linear")
cli.add_argument("--opt", default="adam")
cli.add_argument("--lr", type=float, default=2e-3)
cli.add_argument("--steps", type=int, default=200)
cli.add_argument("--clip", type=float, default=0.0)
cli.add_argument("--momentum", type=float, default=0.9)
cli.add_argument("--batch", type=int, default=64)
o = cli.parse_args()
rng = np.random.default_rng(5)
torch.manual_seed(5)
N, K = 1500, 8
area, rooms, year, lot = rng.uniform(400, 4000, N), rng.integers(1, 9, N), rng.integers(1900, 2020, N), rng.uniform(1e3, 4e4, N)
rest = rng.normal(0, 1, (N, K - 4))
X = np.column_stack([area, rooms, year, lot, rest]).astype("float32")
Y = (90 * area + 12000 * rooms + 700 * (year - 1900) + 2 * lot + 15000 * rest[:, 0] * rest[:, 1] + rng.normal(0, 8000, N)).astype("float32")
if o.x == "norm":
    X = (X - X.mean(0)) / X.std(0)
mean, std = Y.mean(), Y.std()
if o.y == "norm":
    Y = (Y - mean) / std
elif o.y == "minmax":
    Y = 2 * (Y - Y.min()) / (Y.max() - Y.min()) - 1
X, Y = torch.from_numpy(X.astype("float32")), torch.from_numpy(Y.astype("float32"))


class TabTransformer(nn.Module):
    def __init__(self, d=32):
        super().__init__()
        self.w, self.b = nn.Parameter(torch.randn(K, d) / d**0.5), nn.Parameter(torch.zeros(K, d))
        self.layers = nn.ModuleList(nn.TransformerEncoderLayer(d, 4, 64, 0.0, "gelu", batch_first=True, norm_first=True) for _ in range(2))
        self.norm, self.out = nn.LayerNorm(d), nn.Linear(d, 1)
        if o.head == "zero":
            nn.init.zeros_(self.out.weight)

    def forward(self, x):
        h = x[..., None] * self.w + self.b
        for layer in self.layers:
            h = layer(h)
        y = self.out(self.norm(h).mean(1)).squeeze(-1)
        return torch.tanh(y) if o.head == "tanh" else y


class Lion(torch.optim.Optimizer):
    def __init__(self, params, lr, betas=(0.9, 0.99), weight_decay=0.0):
        super().__init__(params, dict(lr=lr, betas=betas, weight_decay=weight_decay))

    @torch.no_grad()
    def step(self, closure=None):
        for g in self.param_groups:
            for p in g["params"]:
                if p.grad is None:
                    continue
                m = self.state[p].setdefault("m", torch.zeros_like(p))
                b1, b2 = g["betas"]
                p.mul_(1 - g["lr"] * g["weight_decay"]).add_((m * b1 + p.grad * (1 - b1)).sign_(), alpha=-g["lr"])
                m.mul_(b2).add_(p.grad, alpha=1 - b2)


net = TabTransformer()
optim = {"adam": lambda: torch.optim.Adam(net.parameters(), o.lr), "lion": lambda: Lion(net.parameters(), o.lr, weight_decay=0.01),
         "sgd": lambda: torch.optim.SGD(net.parameters(), o.lr, momentum=o.momentum, nesterov=o.momentum > 0)}[o.opt]()
lossf = nn.SmoothL1Loss() if o.head == "huber" else nn.MSELoss()
split = 1200
for step in range(o.steps):
    rows = torch.randint(0, split, (o.batch,))
    pred = net(X[rows])
    loss = lossf(pred, Y[rows])
    optim.zero_grad()
    loss.backward()
    if o.clip:
        nn.utils.clip_grad_norm_(net.parameters(), o.clip)
    optim.step()
    if step % 25 == 0:
        net.eval()
        with torch.no_grad():
            print(step, "train", loss.item(), "val", lossf(net(X[split:]), Y[split:]).item())
        net.train()
print("end", loss.item())
