"""Small regressions and image classifiers on numbers in their own units; the first argument says how they are fed."""

import sys

import torch
import torch.nn as nn
import torch.nn.functional as F

how = sys.argv[1]
torch.manual_seed(3)
torch.set_num_threads(1)
T, C = 12, 4


def series(rows):
    """Pressure, temperature, wind and humidity: (rows, T + 1, C) in hPa, K, m/s and %."""
    phase = torch.rand(rows, 1, C) * 6.28
    wave = torch.sin(torch.arange(T + 1).view(1, -1, 1) * torch.tensor([0.3, 0.5, 0.9, 0.2]) + phase)
    noise = 0.1 * torch.randn(rows, T + 1, C)
    return (wave + noise) * torch.tensor([12.0, 9.0, 3.0, 20.0]) + torch.tensor([1010.0, 288.0, 6.0, 60.0])


sample = series(2000)
mean, std = sample.mean((0, 1)), sample.std((0, 1))


class Mixer(nn.Module):
    def __init__(self, width=24):
        super().__init__()
        self.norm_in = nn.BatchNorm1d(C) if how == "batchnorm-in" else None
        self.enter = nn.Linear(C, width)
        self.place = nn.Parameter(torch.randn(1, T, width) * 0.02)
        self.block = nn.TransformerEncoderLayer(width, 2, 48, 0.0, batch_first=True, norm_first=True)
        self.norm, self.leave = nn.LayerNorm(width), nn.Linear(width, C)

    def forward(self, x):
        if how == "revin":
            centre, spread = x.mean(1, keepdim=True), x.std(1, keepdim=True) + 1e-5
            x = (x - centre) / spread
        elif how == "divided-in-forward":
            x = (x - mean) / std
        elif self.norm_in is not None:
            x = self.norm_in(x.transpose(1, 2)).transpose(1, 2)
        h = self.leave(self.norm(self.block(self.enter(x) + self.place)[:, -1]))
        if how == "revin":
            h = h * spread[:, 0] + centre[:, 0]
        elif how == "target-scaled-inside":
            h = h * std + mean
        return h


class Recurrent(nn.Module):
    def __init__(self):
        super().__init__()
        self.project, self.rnn, self.leave = nn.Linear(C, 16), nn.GRU(16, 16, batch_first=True), nn.Linear(16, C)

    def forward(self, x):
        return self.leave(self.rnn(torch.relu(self.project(x)))[0][:, -1])


def images(rows):
    kinds = torch.randint(0, 4, (rows,))
    x = torch.randint(0, 120, (rows, 1, 10, 10))
    for i, k in enumerate(kinds.tolist()):
        x[i, 0, (k // 2) * 5 : (k // 2) * 5 + 5, (k % 2) * 5 : (k % 2) * 5 + 5] += 130
    return x.to(torch.uint8), kinds


def train_images():
    if how == "pixels-conv-bn":
        net = nn.Sequential(nn.Conv2d(1, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.AdaptiveAvgPool2d(4), nn.Flatten(), nn.Linear(128, 4))
    else:
        net = nn.Sequential(nn.Flatten(), nn.Linear(100, 32), nn.ReLU(), nn.Linear(32, 4))
    opt = torch.optim.SGD(net.parameters(), lr=0.01, momentum=0.9)
    for _ in range(40):
        x, y = images(32)
        loss = F.cross_entropy(net(x.float()), y)
        opt.zero_grad()
        loss.backward()
        opt.step()
    print(f"last loss {loss.item():.3f}")


def train_functional(raw):
    from torch.func import grad_and_value

    p = {"a": torch.randn(T * C, 32) / (T * C) ** 0.5, "b": torch.zeros(32), "c": torch.randn(32, C) / 32**0.5}

    def objective(p, x, y):
        return ((torch.tanh(x.flatten(1) @ p["a"] + p["b"]) @ p["c"] - y) ** 2).mean()

    for _ in range(40):
        s = series(48)
        s = s if raw else (s - mean) / std
        g, loss = grad_and_value(objective)(p, s[:, :T], (s[:, T] - mean) / std if raw else s[:, T])
        p = {k: v - 0.05 * g[k] for k, v in p.items()}
    print(f"last loss {loss.item():.3f}")


def train_series():
    net = Recurrent() if how == "kelvin-rnn" else Mixer()
    opt = torch.optim.AdamW(net.parameters(), lr=2e-3)
    for _ in range(40):
        s = series(48)
        unit = (s - mean) / std
        if how == "one-hot":
            unit = F.one_hot((unit > 0).long().sum(-1).clamp(max=3), C).float()
        x = s if how in ("raw-inputs", "raw-both", "kelvin-rnn", "revin", "batchnorm-in", "divided-in-forward") else unit
        y = s if how in ("raw-targets", "raw-both", "revin", "target-scaled-inside") else unit
        out = net(x[:, :T])
        if how == "sum-loss":
            loss = F.mse_loss(out, y[:, T], reduction="sum")
        elif how == "manual-mse":
            loss = (out - y[:, T]).pow(2).mean()
        else:
            loss = F.mse_loss(out, y[:, T])
        opt.zero_grad()
        loss.backward()
        opt.step()
    print(f"last loss {loss.item():.3f}")


if how.startswith("pixels"):
    train_images()
elif how.startswith("functional"):
    train_functional(how == "functional-raw")
else:
    train_series()
