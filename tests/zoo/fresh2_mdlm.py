"""A masked diffusion language model of letters: bidirectional, each position hidden with probability t, loss weighted by 1/t."""

import argparse
import math
import pathlib

import torch
import torch.nn as nn
import torch.nn.functional as F

ap = argparse.ArgumentParser()
ap.add_argument("--schedule", default="linear", choices=["linear", "cosine", "antithetic"])
ap.add_argument("--flaw", default="")
ap.add_argument("--iters", type=int, default=100)
cfg = ap.parse_args()

torch.manual_seed(11)
torch.set_num_threads(1)
raw = (pathlib.Path(__file__).parents[2] / "examples/data/tinyshakespeare.txt").read_text().lower()[:200_000]
alphabet = sorted(set(raw))
stoi = {c: i for i, c in enumerate(alphabet)}
MASK = len(alphabet)
VOCAB = MASK + 1
stream = torch.tensor([stoi[c] for c in raw])
T, B, D, H = 40, 16, 64, 4


class Attend(nn.Module):
    def __init__(self):
        super().__init__()
        self.wq, self.wk, self.wv, self.wo = (nn.Linear(D, D, bias=False) for _ in range(4))

    def forward(self, x):
        _b, _t, _ = x.shape
        q, k, v = (w(x).unflatten(-1, (H, D // H)).transpose(1, 2) for w in (self.wq, self.wk, self.wv))
        if cfg.flaw == "rowsoftmax":
            p = ((q @ k.mT) / math.sqrt(D // H)).softmax(0)
        else:
            p = ((q @ k.mT) / math.sqrt(D // H)).softmax(-1)
        return self.wo((p @ v).transpose(1, 2).flatten(2))


class Denoiser(nn.Module):
    def __init__(self, depth=3):
        super().__init__()
        self.tok = nn.Embedding(VOCAB, D)
        self.pos = nn.Parameter(torch.randn(T, D) * 0.02)
        self.att = nn.ModuleList(Attend() for _ in range(depth))
        self.ffn = nn.ModuleList(nn.Sequential(nn.Linear(D, 4 * D), nn.SiLU(), nn.Linear(4 * D, D)) for _ in range(depth))
        self.na = nn.ModuleList(nn.RMSNorm(D) for _ in range(depth))
        self.nf = nn.ModuleList(nn.RMSNorm(D) for _ in range(depth))
        self.out = nn.Linear(D, VOCAB, bias=False)

    def forward(self, ids):
        h = self.tok(ids) + self.pos
        for a, f, na, nf in zip(self.att, self.ffn, self.na, self.nf):
            h = h + a(na(h))
            h = h + f(nf(h))
        return self.out(F.rms_norm(h, (D,)))


def hiding(n):
    if cfg.schedule == "antithetic":  # one t in every n-th of the unit interval
        t = (torch.rand(1) / n + torch.arange(n) / n) % 1
        return t if cfg.flaw == "noeps" else t.clamp(1e-3, 1)
    t = torch.rand(n)
    if cfg.schedule == "cosine":
        t = 1 - torch.cos(math.pi / 2 * t)
    if cfg.flaw == "noeps":
        t = torch.randint(0, 8, (n,)) / 8
    else:
        t = 1e-3 + (1 - 1e-3) * t
    return t


net = Denoiser()
opt = torch.optim.AdamW(net.parameters(), lr=2e-3, betas=(0.9, 0.98))
warm = torch.optim.lr_scheduler.LambdaLR(opt, lambda i: min(1, (i + 1) / 20))
for it in range(cfg.iters):
    starts = torch.randint(0, len(stream) - T, (B,))
    clean = torch.stack([stream[s : s + T] for s in starts])
    t = hiding(B)[:, None]
    hidden = torch.rand(B, T) < t
    noisy = torch.where(hidden, MASK, clean)
    if cfg.flaw == "clean":
        logits = net(clean)
    else:
        logits = net(noisy)
    ce = F.cross_entropy(logits.transpose(1, 2), clean, reduction="none")
    if cfg.flaw == "noeps":
        loss = (ce * hidden).sum(1).div(t[:, 0]).mean() / T
    else:
        loss = (ce * hidden / t).mean()
    opt.zero_grad(set_to_none=True)
    loss.backward()
    nn.utils.clip_grad_norm_(net.parameters(), 1.0)
    opt.step()
    warm.step()
    if it % 40 == 0:
        print(f"{it:4d} elbo {loss.item():.3f}")


@torch.no_grad()
def unmask(n=2, steps=12):
    ids = torch.full((n, T), MASK)
    for s in range(steps, 0, -1):
        prob = net(ids)[..., :MASK].softmax(-1)
        guess = torch.multinomial(prob.flatten(0, 1), 1).view(n, T)
        reveal = (ids == MASK) & (torch.rand(n, T) < 1 / s)
        ids = torch.where(reveal, guess, ids)
    return ["".join(alphabet[i] for i in row if i < MASK) for row in ids.tolist()]


print(unmask())
