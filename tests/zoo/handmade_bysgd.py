"""MLP on spirals; the optimiser is written by hand."""
import math
import sys

import torch

torch.manual_seed(5)
torch.set_num_threads(1)
how = sys.argv[1] if len(sys.argv) > 1 else "sgd"
bug = sys.argv[2] if len(sys.argv) > 2 else ""

N = 300
th = torch.linspace(0, 3 * math.pi, N)
pts = torch.cat([torch.stack([th * torch.cos(th + k * 2.1), th * torch.sin(th + k * 2.1)], 1) for k in range(3)]) / 9
pts += 0.02 * torch.randn_like(pts)
lab = torch.arange(3).repeat_interleave(N)

W1 = (torch.randn(2, 64) * 0.7).requires_grad_()
b1 = torch.zeros(64, requires_grad=True)
W2 = (torch.randn(64, 64) / 8).requires_grad_()
b2 = torch.zeros(64, requires_grad=True)
W3 = (torch.randn(64, 3) / 8).requires_grad_()
b3 = torch.zeros(3, requires_grad=True)
params = [W1, b1, W2, b2, W3, b3]
m = [torch.zeros_like(p) for p in params]
v = [torch.zeros_like(p) for p in params]


def f(x):
    h = torch.tanh(x @ W1 + b1)
    h = torch.relu(h @ W2 + b2)
    return h @ W3 + b3


for step in range(1, 151):
    idx = torch.randperm(len(pts))[:128]
    z = f(pts[idx])
    if bug == "logsum":
        p = z.exp() / z.exp().sum(1, keepdim=True)
        loss = -torch.log((p > 0.34).float() * p)[torch.arange(len(idx)), lab[idx]].mean()
    else:
        loss = (z.logsumexp(1) - z[torch.arange(len(idx)), lab[idx]]).mean()
    if bug == "nobackward":
        pass
    elif how == "grad":
        gs = torch.autograd.grad(loss, params)
        for p, g in zip(params, gs):
            p.grad = g
    else:
        loss.backward()
    with torch.no_grad():
        for i, p in enumerate(params):
            if p.grad is None:
                continue
            if how == "adam":
                m[i] = 0.9 * m[i] + 0.1 * p.grad
                v[i] = 0.99 * v[i] + 0.01 * p.grad**2
                p -= 0.01 * (m[i] / (1 - 0.9**step)) / ((v[i] / (1 - 0.99**step)).sqrt() + 1e-8)
            elif how == "data":
                p.data -= 0.2 * p.grad
            else:
                p.sub_(0.2 * p.grad)
        if bug != "nozero":
            for p in params:
                if how == "data":
                    p.grad.zero_()
                else:
                    p.grad = None
    if step % 50 == 0:
        print(step, loss.item(), (f(pts).argmax(1) == lab).float().mean().item())
