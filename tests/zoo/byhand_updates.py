"""No optimizer object at all: python byhand_updates.py KIND"""
import sys

import torch
import torch.nn as nn
import torch.nn.functional as F

kind = sys.argv[1] if len(sys.argv) > 1 else "sgd"
torch.manual_seed(11)
torch.set_num_threads(1)
W = torch.randn(16, 6)
net = nn.Sequential(nn.Linear(16, 64), nn.ReLU(), nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 6))
masks = [(torch.rand_like(p) < (0.05 if kind == "pruned" else 1.0)).float() for p in net.parameters()]
if kind == "pruned":  # a lottery ticket
    with torch.no_grad():
        for p, m in zip(net.parameters(), masks):
            p.mul_(m)
            p.mul_(4)
state = [torch.zeros_like(p) for p in net.parameters()]
flat = [p.data.view(-1) for p in net.parameters()]

for step in range(80):
    x = torch.randn(32, 16)
    y = (x @ W).argmax(1)
    loss = F.cross_entropy(net(x), y)
    net.zero_grad()
    loss.backward()
    with torch.no_grad():
        for i, p in enumerate(net.parameters()):
            if kind == "head" and i < 4:
                continue  # only the last layer learns
            if kind == "pruned":
                p.grad.mul_(masks[i])
            if kind == "sign":
                p -= 0.005 * p.grad.sign()
            elif kind == "newton" and p.dim() == 1:
                p -= 0.3 * p.grad
            elif kind == "wrongindex":
                flat[i][i] -= 0.05 * p.grad.sum()
            elif kind == "firstrow":
                for j in range(p.grad.numel()):
                    flat[i][0] -= 0.05 * p.grad.view(-1)[0]
                    break
            else:
                state[i].mul_(0.9).add_(p.grad)
                p -= 0.05 * state[i]
    if step % 20 == 0:
        print(step, loss.item())
