"""A trainer class with a DataLoader and one of torch's schedulers, in all the ways they are used and misused."""

import argparse
import math

import torch
from torch import nn
from torch.optim import lr_scheduler as sch
from torch.utils.data import DataLoader, TensorDataset

ap = argparse.ArgumentParser()
ap.add_argument("kind")
ap.add_argument("--when", default="batch", choices=["batch", "epoch", "never", "micro", "double"])
ap.add_argument("--epochs", type=int, default=6)
ap.add_argument("--plan", type=float, default=1.0, help="planned length over the right one")
ap.add_argument("--units", default="batch", choices=["batch", "epoch", "micro"])
ap.add_argument("--accumulate", type=int, default=1)
ap.add_argument("--stop", type=int, default=0)
args = ap.parse_args()
torch.manual_seed(11)


def make_data(n=384, length=12, words=20):
    x = torch.randint(2, words, (n, length))
    y = (x[:, 0] + x[:, 3] > words).long() + (x[:, -1] > words // 2).long() * 2
    return TensorDataset(x, y)


class Reader(nn.Module):
    def __init__(self, words=20, dim=24, classes=4):
        super().__init__()
        self.embed = nn.Embedding(words, dim)
        self.pos = nn.Parameter(torch.randn(12, dim) * 0.1)
        layer = nn.TransformerEncoderLayer(dim, 2, 48, dropout=0.0, batch_first=True, norm_first=True)
        self.encode = nn.TransformerEncoder(layer, 1, enable_nested_tensor=False)
        self.classify = nn.Linear(dim * 12, classes)

    def forward(self, x):
        return self.classify(self.encode(self.embed(x) + self.pos).flatten(1))


class Fitter:
    def __init__(self):
        self.loader = DataLoader(make_data(), batch_size=16, shuffle=True)
        self.net = Reader()
        self.optim = torch.optim.AdamW(self.net.parameters(), lr=3e-3, weight_decay=0.01)
        self.sched = self.schedule()
        self.loss = nn.CrossEntropyLoss()

    def length(self):
        micro = len(self.loader) * args.epochs
        return max(1, round(args.plan * {"batch": micro // args.accumulate, "epoch": args.epochs, "micro": micro}[args.units]))

    def schedule(self):
        n, o = self.length(), self.optim
        if args.kind == "onecycle":
            return sch.OneCycleLR(o, max_lr=5e-3, total_steps=n + 1)
        if args.kind == "cosine":
            return sch.CosineAnnealingLR(o, T_max=n)
        if args.kind == "linear":
            return sch.LambdaLR(o, lambda k: max(0.0, 1 - k / n))
        if args.kind == "warmcos":
            warm = max(1, n // 10)
            rise = sch.LinearLR(o, start_factor=0.01, total_iters=warm)
            return sch.SequentialLR(o, [rise, sch.CosineAnnealingLR(o, n - warm, eta_min=3e-4)], milestones=[warm])
        if args.kind == "longwarm":
            rise = sch.LinearLR(o, start_factor=0.01, total_iters=5 * n)
            return sch.SequentialLR(o, [rise, sch.CosineAnnealingLR(o, n)], milestones=[5 * n])
        if args.kind == "step":
            return sch.StepLR(o, step_size=max(1, n // 3), gamma=0.3)
        if args.kind == "steep":
            return sch.StepLR(o, step_size=max(1, n // 3), gamma=0.1)
        if args.kind == "multi":
            return sch.MultiStepLR(o, [n // 2, 3 * n // 4], gamma=0.1)
        if args.kind == "exponential":
            return sch.ExponentialLR(o, 0.9)
        if args.kind == "restarts":
            return sch.CosineAnnealingWarmRestarts(o, T_0=max(1, n // 4))
        if args.kind == "cyclic":
            return sch.CyclicLR(o, 3e-4, 3e-3, step_size_up=max(1, n // 8), cycle_momentum=False)
        if args.kind == "plateau":
            return sch.ReduceLROnPlateau(o, factor=0.1, patience=2)
        if args.kind == "flat":
            return sch.LambdaLR(o, lambda k: 1.0)
        if args.kind == "chained":
            return sch.ChainedScheduler([sch.ConstantLR(o, 0.2, total_iters=max(1, n // 10)), sch.ExponentialLR(o, 0.99)])
        if args.kind == "halfwave":
            return sch.LambdaLR(o, lambda k: 0.5 * (1 + math.cos(math.pi * k / n)))
        raise SystemExit(args.kind)

    def advance(self):
        if args.kind == "plateau":
            self.sched.step(self.last)
        else:
            self.sched.step()

    def fit(self):
        done = 0
        for epoch in range(args.epochs):
            self.net.train()
            for i, (x, y) in enumerate(self.loader):
                value = self.loss(self.net(x), y)
                (value / args.accumulate).backward()
                self.last = value.item()
                if args.when == "micro":
                    self.advance()
                if (i + 1) % args.accumulate:
                    continue
                self.optim.step()
                self.optim.zero_grad()
                done += 1
                if args.when in ("batch", "double"):
                    self.advance()
                if args.when == "double":
                    self.advance()
                if args.stop and done >= args.stop:
                    return
            if args.when == "epoch":
                self.advance()
            print(epoch, round(self.last, 3), self.optim.param_groups[0]["lr"])


if __name__ == "__main__":
    Fitter().fit()
