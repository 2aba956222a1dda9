"""Regression in several hands: sensor readings, a policy with advantages, a model with its loss inside, functional weights."""
import sys

import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

style = sys.argv[1] if len(sys.argv) > 1 else "squeezed"
torch.manual_seed(11)
n, features = 256, 6
X = torch.randn(n, features)
Y = (X[:, 0] * X[:, 1] + X[:, 2]).sin()


class Regressor(nn.Module):
    def __init__(self, flat=False):
        super().__init__()
        self.net = nn.Sequential(nn.Linear(features, 32), nn.GELU(), nn.Linear(32, 1))
        self.flat = flat

    def forward(self, x, y=None):
        out = self.net(x)
        if self.flat:
            out = out.squeeze(-1)
        if y is None:
            return out
        return out, (out - y).square().mean()


def batches(size=16):
    y = Y.unsqueeze(1) if style in ("column", "column-flat", "adv-column") else Y
    while True:
        yield from DataLoader(TensorDataset(X, y), size, shuffle=True)


flat = style in ("squeezed", "inside-flat", "column-flat", "adv", "adv-column", "pairwise-rank", "bins")
model = Regressor(flat)
opt = torch.optim.Adam(model.parameters(), lr=3e-3)
stream = batches()
bins = torch.linspace(-1, 1, 16)
for step in range(40):
    x, y = next(stream)
    if style in ("squeezed", "hand", "column", "column-flat"):
        # hand: (16, 1) - (16,); column-flat: (16,) - (16, 1)
        loss = ((model(x) - y) ** 2).mean()
    elif style == "weighted":
        loss = (torch.ones(16) * (model(x).squeeze(-1) - y) ** 2).mean()
    elif style == "mse":
        loss = F.mse_loss(model(x), y)
    elif style == "l1-module":
        loss = nn.SmoothL1Loss()(model(x), y)
    elif style in ("inside", "inside-flat"):
        _, loss = model(x, y)
    elif style in ("adv", "adv-column"):
        dist = torch.distributions.Normal(model(x), 1.0)
        action = dist.sample()
        adv = -(action.view_as(y) - y).abs()
        loss = -(dist.log_prob(action) * (adv - adv.mean())).mean()
    elif style == "logistic":  # binary cross-entropy by hand on (16, 1) and (16,)
        p = torch.sigmoid(model(x))
        t = (y > 0).float()
        loss = -(t * torch.log(p + 1e-6) + (1 - t) * torch.log(1 - p + 1e-6)).mean()
    elif style == "logistic-right":
        p = torch.sigmoid(model(x))
        t = (y > 0).float()[:, None]
        loss = -(t * torch.log(p + 1e-6) + (1 - t) * torch.log(1 - p + 1e-6)).mean()
    elif style == "pairwise-rank":  # every pair on purpose: order of predictions against order of targets
        s = model(x)
        wanted = torch.sign(y.unsqueeze(1) - y)
        loss = F.softplus(-wanted * (s.unsqueeze(1) - s)).mean()
    elif style == "energy":  # energy distance of two samples
        s = model(x).squeeze(-1)
        loss = 2 * (s.unsqueeze(1) - y).abs().mean() - (s.unsqueeze(1) - s).abs().mean() - (y.unsqueeze(1) - y).abs().mean()
    elif style == "quantiles":  # sixteen quantiles of sixteen samples: a pinball grid
        taus = torch.linspace(0.05, 0.95, 16)
        q = model(x) + 0.1 * taus
        err = y.unsqueeze(1) - q
        loss = torch.maximum(taus * err, (taus - 1) * err).mean()
    elif style == "bins":  # soft histogram of the predictions against that of the targets
        kernel = lambda v: torch.exp(-((v.unsqueeze(1) - bins) ** 2) / 0.02).mean(0)
        loss = (kernel(model(x)) - kernel(y)).abs().sum() + F.mse_loss(model(x), y)
    elif style == "outer":  # a low-rank matrix is learnt from outer products
        u = model(x)
        loss = ((u * u.T) - (y[:, None] * y)).square().mean()
    elif style == "scalar-target":
        loss = F.mse_loss(model(x), torch.zeros(1)) + F.mse_loss(model(x).squeeze(1), y)
    else:
        raise SystemExit(f"unknown style {style}")
    opt.zero_grad()
    loss.backward()
    opt.step()
    if step % 10 == 0:
        print(step, round(loss.item(), 4))
