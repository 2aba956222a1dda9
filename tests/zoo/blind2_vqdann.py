"""A domain-adversarial classifier with a vector-quantised bottleneck: gradient reversal, straight-through codes, commitment loss."""

import sys

import torch
import torch.nn as nn
import torch.nn.functional as F

mode = sys.argv[1] if len(sys.argv) > 1 else "ok"
gen = torch.Generator().manual_seed(6)
torch.manual_seed(6)
torch.set_num_threads(1)
STEPS, CODES, WIDE = 120, 16, 32


class Reverse(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, strength):
        ctx.strength = strength
        return x.view_as(x)

    @staticmethod
    def backward(ctx, grad):
        return -ctx.strength * grad, None


class Quantiser(nn.Module):
    def __init__(self):
        super().__init__()
        self.codes = nn.Parameter(torch.randn(CODES, WIDE) * 0.3)

    def forward(self, z):
        nearest = torch.cdist(z, self.codes).argmin(-1)
        q = self.codes[nearest]
        loss = F.mse_loss(q, z.detach()) + 0.25 * F.mse_loss(z, q.detach())
        if mode == "cut":
            return q.detach(), torch.zeros(())
        return z + (q - z).detach(), loss


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.features = nn.Sequential(nn.Linear(20, 64), nn.ReLU(), nn.Linear(64, WIDE))
        self.vq = Quantiser()
        self.label_head, self.domain_head = nn.Linear(WIDE, 3), nn.Sequential(nn.Linear(WIDE, 32), nn.ReLU(), nn.Linear(32, 2))

    def forward(self, x, strength):
        z = self.features(x)
        q, vq_loss = self.vq(z)
        return self.label_head(q), self.domain_head(Reverse.apply(z, strength)), vq_loss


teach = torch.randn(20, 3, generator=gen)


def batch(n=64):
    x = torch.randn(n, 20, generator=gen)
    domain = torch.randint(2, (n,), generator=gen)
    return x + 0.4 * domain[:, None], (x @ teach).argmax(-1), domain


net = Net()
opt = torch.optim.Adam(net.parameters(), 2e-3)
for step in range(STEPS):
    net.train()
    x, y, domain = batch()
    strength = 2 / (1 + torch.exp(torch.tensor(-5.0 * step / STEPS)).item()) - 1
    labels, domains, vq_loss = net(x, strength)
    loss = F.cross_entropy(labels, y) + 0.3 * F.cross_entropy(domains, domain) + vq_loss
    opt.zero_grad()
    loss.backward()
    opt.step()
    if step % 40 == 39:
        print(step, round(loss.item(), 3), (labels.argmax(-1) == y).float().mean().item())
