"""A small diffusion transformer for 8 x 8 patterns in float16 autocast with a gradient scaler and an averaged copy of the weights."""

import argparse
import copy
import math

import torch
import torch.nn as nn
import torch.nn.functional as F

parser = argparse.ArgumentParser()
parser.add_argument("--fault", default="none")
parser.add_argument("--scale", type=float, default=2.0**12)
parser.add_argument("--steps", type=int, default=70)
args = parser.parse_args()


class UnitNorm(nn.Module):
    """Tokens of unit length, times a gain."""

    def __init__(self, dim):
        super().__init__()
        self.gain = nn.Parameter(torch.full((dim,), dim**0.5))

    def forward(self, x):
        if args.fault == "tinyeps":
            x = x.half()
            return x / (x.norm(dim=-1, keepdim=True) + 1e-8) * self.gain.half()
        return F.normalize(x.float(), dim=-1, eps=1e-6) * self.gain


class RMS(nn.Module):
    def __init__(self, dim):
        super().__init__()
        self.gain = nn.Parameter(torch.ones(dim))

    def forward(self, x):
        wide = x if args.fault == "square" else x.float()
        return (wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + 1e-5)) * self.gain


class DiTBlock(nn.Module):
    def __init__(self, dim, heads=4):
        super().__init__()
        self.heads = heads
        self.n1, self.n2 = UnitNorm(dim), RMS(dim)
        self.qkv, self.proj = nn.Linear(dim, 3 * dim), nn.Linear(dim, dim)
        self.mlp = nn.Sequential(nn.Linear(dim, 3 * dim), nn.SiLU(), nn.Linear(3 * dim, dim))
        self.ada = nn.Linear(dim, 3 * dim)
        nn.init.zeros_(self.ada.weight)
        nn.init.zeros_(self.ada.bias)

    def forward(self, x, c):
        b, t, d = x.shape
        shift, scale, gate = self.ada(c)[:, None].chunk(3, -1)
        h = self.n1(x) * (1 + scale) + shift
        q, k, v = self.qkv(h).view(b, t, 3, self.heads, -1).permute(2, 0, 3, 1, 4)
        x = x + (1 + gate) * self.proj(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(b, t, d))
        return x + self.mlp(self.n2(x))


class DiT(nn.Module):
    def __init__(self, dim=48, depth=2):
        super().__init__()
        self.dim = dim
        self.inp, self.time = nn.Linear(4, dim, bias=False), nn.Sequential(nn.Linear(dim, dim), nn.SiLU(), nn.Linear(dim, dim))
        self.pos = nn.Parameter(torch.randn(16, dim) * (0.0 if args.fault == "tinyeps" else 0.02))
        self.blocks = nn.ModuleList(DiTBlock(dim) for _ in range(depth))
        self.out = nn.Linear(dim, 4)

    def forward(self, x, t):
        b = x.shape[0]
        angle = t[:, None] * 1000 / torch.logspace(0, 4, self.dim // 2)
        c = self.time(torch.cat([angle.sin(), angle.cos()], 1))
        h = self.inp(x.view(b, 4, 2, 4, 2).transpose(2, 3).reshape(b, 16, 4))
        h = h + self.pos
        if args.fault == "square":
            h = h * 1000
        for block in self.blocks:
            h = block(h, c)
        return self.out(h).view(b, 4, 4, 2, 2).transpose(2, 3).reshape(b, 8, 8)


def patterns(n):
    k = torch.randint(1, 4, (n, 2)).float()
    phase = torch.rand(n) * 2 * math.pi
    grid = torch.arange(8) / 8 * 2 * math.pi
    x = torch.sin(k[:, :1, None] * grid[None, :, None] + k[:, 1:, None] * grid + phase[:, None, None])
    x[: n // 8] = 0  # blank pictures
    return x


def noised(x):
    t = torch.rand(x.shape[0])
    noise = torch.randn_like(x)
    if args.fault == "tinyeps":
        noise[:2] = 0  # conditioning rows keep their clean picture
    a = torch.cos(t * math.pi / 2)[:, None, None]
    return a * x + (1 - a**2).clamp(min=0).sqrt() * noise, t, noise


torch.manual_seed(5)
torch.set_num_threads(1)
model = DiT()
ema = copy.deepcopy(model).requires_grad_(False)
optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
if args.fault == "growth":
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**20, growth_interval=1)
else:
    scaler = torch.amp.GradScaler("cpu", init_scale=args.scale)
for step in range(args.steps):
    noisy, t, noise = noised(patterns(32))
    with torch.autocast("cpu", dtype=torch.float16):
        guess = model(noisy, t)
    loss = F.mse_loss(guess.float(), noise)
    optimizer.zero_grad(set_to_none=True)
    scaler.scale(loss).backward()
    if args.fault == "clipfirst":
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        scaler.unscale_(optimizer)
    else:
        scaler.unscale_(optimizer)
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    scaler.step(optimizer)
    scaler.update()
    with torch.no_grad():
        for slow, fast in zip(ema.parameters(), model.parameters()):
            slow.lerp_(fast, 0.02)
    if step % 20 == 0:
        print(step, loss.item(), scaler.get_scale())
