"""Stepped once an epoch, and the run is over before the first epoch is: nothing is wrong with that."""

import sys

import torch
from torch import nn

torch.manual_seed(5)
limit = int(sys.argv[1]) if len(sys.argv) > 1 else 60
encoder = nn.GRU(8, 24, batch_first=True)
head = nn.Linear(24, 8)
params = [*encoder.parameters(), *head.parameters()]
opt = torch.optim.RMSprop(params, lr=1e-3)
decay = torch.optim.lr_scheduler.StepLR(opt, 10, gamma=0.5)


def epoch(state):
    for _ in range(200):
        t = torch.rand(16, 1, 1) * 6 + torch.arange(21).view(1, -1, 1) * 0.3
        wave = torch.sin(t * torch.arange(1, 9).view(1, 1, -1) / 4)
        out = head(encoder(wave[:, :-1])[0])
        loss = (out - wave[:, 1:]).square().mean()
        opt.zero_grad()
        loss.backward()
        opt.step()
        state["step"] += 1
        if state["step"] == limit:
            return loss.item()
    return loss.item()


state = {"step": 0}
for number in range(50):
    value = epoch(state)
    print(number, value)
    if state["step"] >= limit:
        break
    decay.step()
