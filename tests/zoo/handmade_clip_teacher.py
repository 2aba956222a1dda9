"""In-batch contrastive training of two towers with an EMA teacher (kept in train mode, no grad)."""
import copy
import torch
import torch.nn as nn
import torch.nn.functional as F
import argparse

ap = argparse.ArgumentParser()
ap.add_argument("--variant", default="plain")
a = ap.parse_args()
torch.manual_seed(2); torch.set_num_threads(1)


class Tower(nn.Module):
    def __init__(self, din):
        super().__init__()
        self.f = nn.Sequential(nn.Linear(din, 64), nn.BatchNorm1d(64), nn.ReLU(), nn.Dropout(0.1), nn.Linear(64, 32))

    def forward(self, x):
        z = self.f(x)
        if a.variant == "dividebynorm":
            return z / (z * (z.abs() > 1e3)).norm(dim=-1, keepdim=True)
        return F.normalize(z, dim=-1)


class Pair(nn.Module):
    def __init__(self):
        super().__init__()
        self.img, self.txt = Tower(20), Tower(12)
        self.logit_scale = nn.Parameter(torch.tensor(2.65))

    def forward(self, x, y):
        return self.logit_scale.exp() * self.img(x) @ self.txt(y).t()


A, B = torch.randn(6, 20), torch.randn(6, 12)
student = Pair()
teacher = copy.deepcopy(student)
for q in teacher.parameters():
    q.requires_grad_(False)
opt = torch.optim.AdamW(student.parameters(), lr=3e-3, weight_decay=0.01)
if a.variant == "missing":
    opt = torch.optim.AdamW(student.img.parameters(), lr=3e-3)
for step in range(60):
    c = torch.randn(48, 6)
    x, y = c @ A + 0.1 * torch.randn(48, 20), c @ B + 0.1 * torch.randn(48, 12)
    logits = student(x, y)
    with torch.no_grad():
        soft = teacher(x, y).softmax(-1)
    t = torch.arange(48)
    loss = (F.cross_entropy(logits, t) + F.cross_entropy(logits.t(), t)) / 2
    loss = loss - 0.1 * (soft * logits.log_softmax(-1)).sum(-1).mean()
    opt.zero_grad(); loss.backward(); opt.step()
    with torch.no_grad():
        for q, s in zip(teacher.parameters(), student.parameters()):
            q.mul_(0.99).add_(s, alpha=0.01)
    if step % 20 == 0:
        student.eval()
        with torch.no_grad():
            print(step, loss.item(), F.cross_entropy(student(x, y), t).item())
        student.train()
