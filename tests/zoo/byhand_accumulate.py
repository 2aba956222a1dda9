"""Micro-batches in many ways: python byhand_accumulate.py KIND [K]"""
import sys

import torch
import torch.nn as nn
import torch.nn.functional as F

kind = sys.argv[1] if len(sys.argv) > 1 else "once"
K = int(sys.argv[2]) if len(sys.argv) > 2 else 4
torch.manual_seed(5)
torch.set_num_threads(1)
W = torch.randn(10, 4)


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.a = nn.Linear(10, 32)
        self.b = nn.Linear(32, 4)

    def forward(self, x):
        return self.b(torch.tanh(self.a(x)))


net = Net()
opt = torch.optim.SGD(net.parameters(), lr=0.2, momentum=0.9) if kind != "adam" else torch.optim.Adam(net.parameters(), 5e-3)
for it in range(60):
    opt.zero_grad()
    for k in range(K):
        x = torch.randn(16, 10)
        y = (x @ W).argmax(1)
        loss = F.cross_entropy(net(x), y)
        if kind == "running":  # the mean of what has come so far
            for p in net.parameters():
                if p.grad is not None:
                    p.grad.mul_(k / (k + 1))
            (loss / (k + 1)).backward()
        elif kind == "loss":
            (loss / K).backward()
        else:
            loss.backward()
        if kind in ("again", "adam"):
            for p in net.parameters():
                p.grad /= K
        if kind == "clipeach":
            nn.utils.clip_grad_norm_(net.parameters(), 100.0)
    if kind in ("once", "clipeach"):
        for p in net.parameters():
            p.grad.div_(K)
    if kind == "foreach":
        torch._foreach_div_([p.grad for p in net.parameters()], float(K))
    opt.step()
    if it % 20 == 0:
        print(it, loss.item())
