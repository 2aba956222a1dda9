"""A masked autoencoder over small pictures: three quarters of the patches are hidden, pixels normalised by patch are predicted."""

import math
import sys

import torch
from torch import nn
from torch.utils.data import DataLoader, Dataset

OPTS = dict(a.split("=") for a in sys.argv[1:])
WRONG = OPTS.get("wrong")
torch.manual_seed(17)
torch.set_num_threads(1)


class Shapes(Dataset):
    """Grey pictures, 24 by 24: blobs and stripes over a dim ground."""

    def __init__(self, n=600, black=False):
        g = torch.Generator().manual_seed(3)
        yy, xx = torch.meshgrid(torch.arange(24.0), torch.arange(24.0), indexing="ij")
        c = torch.rand(n, 2, 1, 1, generator=g) * 24
        r = torch.rand(n, 1, 1, generator=g) * 5 + 2
        blob = torch.exp(-((yy - c[:, 0]) ** 2 + (xx - c[:, 1]) ** 2) / (2 * r**2))
        stripe = 0.5 + 0.5 * torch.sin((xx + yy) * (torch.rand(n, 1, 1, generator=g) * 0.8 + 0.2))
        self.x = (0.6 * blob + 0.3 * stripe + 0.05 * torch.randn(n, 24, 24, generator=g)).clamp(0, 1)
        if black:
            self.x[:, :4, :4] = 0.0

    def __len__(self):
        return len(self.x)

    def __getitem__(self, i):
        x = self.x[i]
        return x.flip(-1) if torch.rand(()) < 0.5 else x


def patches(x, p=4):
    b, h, w = x.shape
    return x.view(b, h // p, p, w // p, p).permute(0, 1, 3, 2, 4).reshape(b, -1, p * p)


class TokenNorm(nn.Module):
    """Standardises over the wrong axis if told so."""

    def __init__(self, d):
        super().__init__()
        self.g, self.b = nn.Parameter(torch.ones(d)), nn.Parameter(torch.zeros(d))

    def forward(self, x):
        axis = 0 if WRONG == "axis" else -1
        m, v = x.mean(axis, keepdim=True), x.var(axis, unbiased=False, keepdim=True)
        return (x - m) * torch.rsqrt(v + 1e-5) * self.g + self.b


def layers(n, d):
    body = nn.TransformerEncoder(
        nn.TransformerEncoderLayer(d, 4, 2 * d, 0.0, nn.functional.gelu, batch_first=True, norm_first=True), n, enable_nested_tensor=False
    )
    return nn.Sequential(body, TokenNorm(d))


class MAE(nn.Module):
    def __init__(self, d=64, dd=48, keep=0.25):
        super().__init__()
        self.keep = keep
        self.embed = nn.Linear(16, d)
        self.cls = nn.Parameter(torch.zeros(1, 1, d))
        self.pos = nn.Parameter(torch.randn(36, d) * 0.02)
        self.encoder = layers(3, d)
        self.bridge = nn.Linear(d, dd)
        self.blank = nn.Parameter(torch.zeros(1, 1, dd))
        if WRONG == "loosepos":
            self.dpos = [torch.randn(37, dd, requires_grad=True)]
        else:
            self.dpos = nn.ParameterList([nn.Parameter(torch.randn(37, dd) * 0.02)])
        self.decoder = layers(2, dd)
        self.paint = nn.Linear(dd, 16)
        for p in self.parameters():
            if p.ndim == 2 and min(p.shape) > 16:
                nn.init.xavier_uniform_(p)

    def forward(self, x):
        goal = patches(x)
        b, n, _ = goal.shape
        noise = torch.rand(b, n)
        shuffle = noise.argsort(1)
        restore = shuffle.argsort(1)
        kept = shuffle[:, : int(n * self.keep)]
        h = self.embed(goal - 0.35) + self.pos
        h = h.gather(1, kept[..., None].expand(-1, -1, h.shape[-1]))
        h = self.bridge(self.encoder(torch.cat([self.cls.expand(b, -1, -1), h], 1)))
        if WRONG == "cutbridge":
            h = torch.tensor(h.detach().numpy())
        fill = self.blank.expand(b, n - kept.shape[1], -1)
        d = torch.cat([h[:, 1:], fill], 1)
        d = d.gather(1, restore[..., None].expand(-1, -1, d.shape[-1]))
        d = torch.cat([h[:, :1], d], 1) + self.dpos[0]
        out = self.paint(self.decoder(d))[:, 1:]
        hidden = torch.ones(b, n)
        hidden[:, : kept.shape[1]] = 0
        hidden = hidden.gather(1, restore)
        mean, var = goal.mean(-1, keepdim=True), goal.var(-1, keepdim=True)
        goal = (goal - mean) / (var.sqrt() if WRONG == "flat" else (var + 1e-6).sqrt())
        each = (out - goal).pow(2).mean(-1)
        return (each * hidden).sum() / hidden.sum(), out


def schedule(step, warm, total):
    return step / warm if step < warm else 0.5 * (1 + math.cos(math.pi * (step - warm) / (total - warm)))


model = MAE()
loader = DataLoader(
    Shapes(black=WRONG == "flat"),
    batch_size=int(OPTS.get("batch", 36)),
    shuffle=True,
    drop_last=True,
    num_workers=int(OPTS.get("workers", 0)),
)
epochs = int(OPTS.get("epochs", 4))
opt = torch.optim.AdamW(model.parameters(), lr=2e-3, betas=(0.9, 0.95), weight_decay=0.05)
step = 0
for epoch in range(epochs):
    seen = 0.0
    for x in loader:
        for g in opt.param_groups:
            g["lr"] = 2e-3 * schedule(step + 1, 20, epochs * len(loader) + 1)
        loss, _ = model(x)
        model.zero_grad()
        loss.backward()
        opt.step()
        step += 1
        seen += loss.item() / len(loader)
    print("epoch", epoch, "loss", round(seen, 4))
