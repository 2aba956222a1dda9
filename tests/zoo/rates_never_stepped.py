"""A schedule that is built and then forgotten, or not meant to be stepped."""

import sys

import torch
from torch import nn

torch.manual_seed(0)
mode = sys.argv[1]


class Gate(nn.Module):
    def __init__(self):
        super().__init__()
        self.layers = nn.Sequential(nn.Linear(16, 64), nn.LayerNorm(64), nn.GELU(), nn.Linear(64, 1))

    def forward(self, x):
        return self.layers(x).squeeze(-1)


def batches(count):
    g = torch.Generator().manual_seed(1)
    w = torch.randn(16, generator=g)
    for _ in range(count):
        x = torch.randn(32, 16, generator=g)
        yield x, torch.sin(x @ w / 4)


def build(model):
    optimizer = torch.optim.Adam(model.parameters(), lr=2e-3)
    if mode == "constant":
        plan = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda epoch: 1.0)
    else:
        plan = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 120)
    return optimizer, plan


model = Gate()
optimizer, plan = build(model)
for number, (x, y) in enumerate(batches(120)):
    optimizer.zero_grad()
    loss = nn.functional.mse_loss(model(x), y)
    loss.backward()
    optimizer.step()
    if mode == "hand":  # the schedule is only a table to look rates up in
        for group in optimizer.param_groups:
            group["lr"] = 2e-3 * (1 - number / 120)
    if number % 30 == 0:
        print(number, loss.item(), plan.get_last_lr())
