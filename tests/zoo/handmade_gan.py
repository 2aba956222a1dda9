import torch
from torch import nn, optim
import argparse

p = argparse.ArgumentParser(); p.add_argument("--wgan", action="store_true"); p.add_argument("--fault", default="")
o = p.parse_args()
torch.set_num_threads(1); torch.manual_seed(11)
G = nn.Sequential(nn.Linear(8, 64), nn.LeakyReLU(0.2), nn.Linear(64, 64), nn.LeakyReLU(0.2), nn.Linear(64, 2))
D = nn.Sequential(nn.Linear(2, 64), nn.LeakyReLU(0.2), nn.Linear(64, 64), nn.LeakyReLU(0.2), nn.Linear(64, 1))
og = optim.Adam(G.parameters(), lr=1e-3, betas=(0.5, 0.9))
od = optim.Adam(D.parameters(), lr=1e-3, betas=(0.5, 0.9))
bce = nn.BCEWithLogitsLoss()
centres = torch.randn(6, 2) * 2
for it in range(80):
    real = centres[torch.randint(6, (64,))] + 0.1 * torch.randn(64, 2)
    fake = G(torch.randn(64, 8))
    od.zero_grad()
    if o.wgan:
        a = torch.rand(64, 1)
        mix = (a * real + (1 - a) * fake.detach()).requires_grad_()
        if o.fault == "gpzero":
            mix = (mix * 0 + 1.0)
        g, = torch.autograd.grad(D(mix).sum(), mix, create_graph=True)
        if o.fault == "gpnan":
            gp = ((g - g.detach()).pow(2).sum(1).sqrt() - 1).pow(2).mean()
        else:
            gp = (g.norm(2, dim=1) - 1).pow(2).mean()
        ld = D(fake.detach()).mean() - D(real).mean() + 10 * gp
    else:
        ld = bce(D(real), torch.ones(64, 1)) + bce(D(fake.detach()), torch.zeros(64, 1))
    ld.backward()
    od.step()
    og.zero_grad()
    lg = -D(fake).mean() if o.wgan else bce(D(fake), torch.ones(64, 1))
    lg.backward()
    og.step()
    if it % 20 == 0:
        print(it, ld.item(), lg.item())
