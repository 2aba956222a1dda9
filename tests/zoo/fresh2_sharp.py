"""Sentences' speakers told apart by a small convolutional encoder, under a choice of unusual optimizers written here."""

import pathlib
import re
import sys

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch.optim.swa_utils import SWALR, AveragedModel

how, fault = ([*sys.argv[1:], "adamw", ""])[:2] if len(sys.argv) > 1 else ("adamw", "")
torch.manual_seed(21)
torch.set_num_threads(1)
play = (pathlib.Path(__file__).parents[2] / "examples/data/tinyshakespeare.txt").read_text()
speeches = re.findall(r"^([A-Z][A-Za-z ]+):\n(.+?)(?:\n\n|\Z)", play, re.S | re.M)
names = ["MENENIUS", "GLOUCESTER", "ROMEO", "DUKE VINCENTIO"]
rows = [(names.index(w), s.lower()[:80]) for w, s in speeches if w in names and len(s) > 20]
chars = {c: i + 1 for i, c in enumerate(sorted({c for _, s in rows for c in s}))}
X = torch.tensor([[chars[c] for c in s] + [0] * (80 - len(s)) for _, s in rows])
Y = torch.tensor([w for w, _ in rows])
order = torch.randperm(len(X), generator=torch.Generator().manual_seed(1))
X, Y = X[order], Y[order]
cut = int(len(X) * 0.8)
share = torch.bincount(Y[:cut], minlength=len(names)).float()
balance = share.sum() / (len(names) * share)


class Speaker(nn.Module):
    def __init__(self, width=48):
        super().__init__()
        self.letters = nn.Embedding(len(chars) + 1, width, padding_idx=0)
        self.convs = nn.ModuleList(nn.Conv1d(width, 32, k, padding=k // 2) for k in (3, 5, 7))
        self.drop = nn.Dropout(0.2)
        self.out = nn.Linear(96, len(names))

    def forward(self, ids):
        x = self.letters(ids).mT
        return self.out(self.drop(torch.cat([F.relu(c(x)).amax(-1) for c in self.convs], 1)))


class SAM(torch.optim.Optimizer):
    """Sharpness-aware minimisation: ascend by rho, take the gradient there, go back and step."""

    def __init__(self, params, base, rho=0.05, **kw):
        super().__init__(params, dict(rho=rho, **kw))
        self.base = base(self.param_groups, **kw)
        self.param_groups = self.base.param_groups

    @torch.no_grad()
    def ascend(self):
        norm = torch.stack([p.grad.norm() for g in self.param_groups for p in g["params"] if p.grad is not None]).norm()
        for g in self.param_groups:
            for p in g["params"]:
                if p.grad is not None:
                    self.state[p]["before"] = p.clone()
                    p.add_(p.grad * (g["rho"] / (norm + 1e-12)))

    @torch.no_grad()
    def step(self, closure=None):
        for g in self.param_groups:
            for p in g["params"]:
                if "before" in self.state[p]:
                    p.copy_(self.state[p]["before"])
        self.base.step()


class Lookahead:
    """k fast steps, one slow one."""

    def __init__(self, fast, k=5, alpha=0.5):
        self.fast, self.k, self.alpha, self.n = fast, k, alpha, 0
        self.slow = [[p.detach().clone() for p in g["params"]] for g in fast.param_groups]

    def zero_grad(self):
        self.fast.zero_grad()

    def step(self):
        self.fast.step()
        self.n += 1
        if self.n % self.k == 0:
            with torch.no_grad():
                for group, kept in zip(self.fast.param_groups, self.slow):
                    for p, s in zip(group["params"], kept):
                        s.add_(p - s, alpha=self.alpha)
                        p.copy_(s)


class Lion(torch.optim.Optimizer):
    def __init__(self, params, lr=3e-4, betas=(0.9, 0.99), wd=0.01):
        super().__init__(params, {"lr": lr, "betas": betas, "wd": wd})

    @torch.no_grad()
    def step(self, closure=None):
        for group in self.param_groups:
            for p in group["params"]:
                if p.grad is None:
                    continue
                m = self.state[p].setdefault("m", torch.zeros_like(p))
                a, b = group["betas"]
                move = (a * m + (1 - a) * p.grad).sign()
                if fault == "rebinds":
                    p = p * (1 - group["lr"] * group["wd"]) - group["lr"] * move
                else:
                    p.mul_(1 - group["lr"] * group["wd"]).add_(move, alpha=-group["lr"])
                m.lerp_(p.grad if p.grad is not None else torch.zeros_like(p), 1 - b)


def focal(logits, goal, gamma=2.0):
    if fault == "focal":
        p = logits.mul(4).softmax(-1)
        return (-(1 - p).pow(0.5) * p.log()).gather(1, goal[:, None]).mean()
    logp = logits.log_softmax(-1).gather(1, goal[:, None])[:, 0]
    return (-((1 - logp.exp()) ** gamma) * logp * balance[goal]).mean()


def criterion(logits, goal):
    if how == "focal":
        return focal(logits, goal)
    return F.cross_entropy(logits, goal, weight=balance, label_smoothing=0.05)


model = Speaker()
average = teacher = swalr = None
if how == "sam":
    opt = SAM(model.parameters(), torch.optim.SGD, rho=0.05, lr=0.1, momentum=0.9)
elif how == "lookahead":
    opt = Lookahead(torch.optim.RAdam(model.parameters(), lr=2e-3))
elif how == "lion":
    opt = Lion(model.parameters())
elif how == "swa":
    opt = torch.optim.SGD(model.parameters(), lr=0.03, momentum=0.9, nesterov=True)
    average, swalr = AveragedModel(model), SWALR(opt, swa_lr=0.01, anneal_epochs=2)
else:
    opt = torch.optim.AdamW(model.parameters(), lr=2e-3)
if fault == "lowvar":
    model.out = nn.Linear(96, len(names))
for epoch in range(4):
    model.train()
    for idx in torch.randperm(cut).split(32):
        x, y = X[idx], Y[idx]
        if how == "sam":
            loss = criterion(model(x), y)
            loss.backward()
            opt.ascend()
            opt.zero_grad()
            criterion(model(x), y).backward()
            opt.step()
            opt.zero_grad()
            continue
        if how == "penalty":
            e = model.letters(x).detach().requires_grad_()
            h = torch.cat([F.relu(c(e.mT)).amax(-1) for c in model.convs], 1)
            out = model.out(model.drop(h))
            loss = criterion(out, y)
            (slope,) = torch.autograd.grad(loss, e, create_graph=True)
            flat = slope.flatten(1) * len(x)
            size = (flat.pow(2).sum(1) + 1e-12).sqrt()
            loss = criterion(model(x), y) + 0.01 * size.mean()
        else:
            loss = criterion(model(x), y)
        opt.zero_grad()
        loss.backward()
        opt.step()
    if average is not None and epoch >= 2:
        average.update_parameters(model)
        swalr.step()
    judge = (average or model).eval()
    with torch.inference_mode():
        right = (judge(X[cut:]).argmax(-1) == Y[cut:]).float().mean().item()
    print(f"{how} epoch {epoch} loss {loss.item():.3f} accuracy {right:.3f}")
