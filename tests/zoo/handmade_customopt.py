"""Convolutional digits-like classifier with a home-made Lion and a straight-through activation."""
import argparse
import torch
import torch.nn as nn
import torch.nn.functional as F

a = argparse.ArgumentParser()
a.add_argument("--opt", default="lion")
a.add_argument("--fault", default="")
a = a.parse_args()
torch.manual_seed(42)
torch.set_num_threads(1)


class Lion(torch.optim.Optimizer):
    def __init__(self, params, lr=1e-3, beta=0.9):
        super().__init__(params, dict(lr=lr, beta=beta))

    @torch.no_grad()
    def step(self):
        for g in self.param_groups:
            for i, p in enumerate(g["params"]):
                if p.grad is None:
                    continue
                m = self.state[p].setdefault("m", torch.zeros_like(p))
                d = (m * g["beta"] + p.grad * 0.1).sign()
                if a.fault == "row":
                    p[i % len(p)] -= g["lr"] * (d[i % len(p)])
                elif a.fault == "copy":
                    p.flatten().clone().sub_(g["lr"] * d.flatten())
                else:
                    p.add_(d, alpha=-g["lr"])
                m.mul_(0.99).add_(p.grad, alpha=0.01)


class Binarize(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        ctx.save_for_backward(x)
        return x.sign()

    @staticmethod
    def backward(ctx, g):
        (x,) = ctx.saved_tensors
        return g * (x.abs() <= 1) if a.fault != "badfn" else g / (x - x)


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.c1, self.c2 = nn.Conv2d(1, 8, 3, padding=1), nn.Conv2d(8, 16, 3, padding=1)
        self.b1, self.b2 = nn.BatchNorm2d(8), nn.BatchNorm2d(16)
        self.fc = nn.Linear(16 * 9 + (1 if a.fault == "shape" else 0), 4)
        if a.fault == "dead":
            nn.init.constant_(self.c2.bias, -40.0)
            self.b2 = nn.Identity()

    def forward(self, x):
        x = F.max_pool2d(Binarize.apply(self.b1(self.c1(x))), 2)
        x = F.max_pool2d(F.relu(self.b2(self.c2(x))), 2)
        return self.fc(x.flatten(1))


proto = torch.randn(4, 1, 12, 12)
net = Net()
opt = {"lion": lambda p: Lion(p, 1e-3), "sgd": lambda p: torch.optim.SGD(p, 0.05, momentum=0.9), "adagrad": lambda p: torch.optim.Adagrad(p, 0.02)}[a.opt](net.parameters())
cyc = torch.optim.lr_scheduler.CyclicLR(opt, 1e-4, 2e-3, step_size_up=10, cycle_momentum=False) if a.opt == "lion" else None
for ep in range(3):
    net.train()
    for it in range(20):
        y = torch.randint(4, (32,))
        x = proto[y] + 0.8 * torch.randn(32, 1, 12, 12)
        loss = F.cross_entropy(net(x), y)
        net.zero_grad()
        loss.backward()
        opt.step()
        if cyc:
            cyc.step()
    net.eval()
    with torch.inference_mode():
        y = torch.randint(4, (256,))
        acc = (net(proto[y] + 0.8 * torch.randn(256, 1, 12, 12)).argmax(1) == y).float().mean()
    print(ep, loss.item(), acc.item())
