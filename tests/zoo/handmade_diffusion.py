# DDPM on 2-d moons, with SiLU MLP, EMA and grad clipping
import torch, math, sys
import torch.nn as nn
torch.set_num_threads(1)
torch.manual_seed(4)
opts = set(sys.argv[1:])
T = 100
beta = torch.linspace(1e-4, 0.02, T)
abar = torch.cumprod(1 - beta, 0)


class Denoiser(nn.Module):
    def __init__(self, w=64):
        super().__init__()
        self.temb = nn.Embedding(T, w)
        self.inp = nn.Linear(2, w)
        self.mid = nn.ModuleList([nn.Sequential(nn.LayerNorm(w), nn.Linear(w, w), nn.SiLU(), nn.Linear(w, w)) for _ in range(3)])
        self.out = nn.Linear(w, 2)
        nn.init.zeros_(self.out.weight); nn.init.zeros_(self.out.bias)

    def forward(self, x, t):
        h = self.inp(x) + self.temb(t)
        for m in self.mid:
            h = h + m(h)
        return self.out(h)


net = Denoiser()
ema = [p.detach().clone() for p in net.parameters()]
opt = torch.optim.AdamW(net.parameters(), lr=1e-3)
for it in range(120):
    a = torch.rand(128) * math.pi
    up = torch.rand(128) < 0.5
    x0 = torch.stack([torch.where(up, a.cos(), 1 - a.cos()), torch.where(up, a.sin(), 0.5 - a.sin())], 1) + 0.05 * torch.randn(128, 2)
    if "nanrow" in opts and it == 40:
        x0[7, 1] = float("nan")
    t = torch.randint(0, T, (128,))
    eps = torch.randn_like(x0)
    xt = abar[t].sqrt()[:, None] * x0 + (1 - abar[t]).sqrt()[:, None] * eps
    w = 1.0
    if "snr" in opts:
        w = torch.clamp(abar[t] / (1 - abar[t]), max=5.0)[:, None]
    if "snrbug" in opts:
        w = 1.0 / (t.float() / T).floor().add(t.float().sign())[:, None]
    loss = (w * (net(xt, t) - eps) ** 2).mean()
    opt.zero_grad(set_to_none=True)
    loss.backward()
    nn.utils.clip_grad_norm_(net.parameters(), 1.0)
    opt.step()
    with torch.no_grad():
        for e, p in zip(ema, net.parameters()):
            e.lerp_(p, 0.01)
    if it % 40 == 0:
        print(it, loss.item())
