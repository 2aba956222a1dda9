"""A recurrent mixer in the manner of RWKV behind a Trainer class; the state of every stream is carried from batch to batch, cut off."""

import argparse
import pathlib
from dataclasses import dataclass, field

import torch
import torch.nn as nn
import torch.nn.functional as F


@dataclass
class RunConfig:
    dim: int = 64
    depth: int = 2
    streams: int = 12
    chunk: int = 24
    steps: int = 60
    lr: float = 3e-3
    oddity: str = "none"
    carry: bool = True
    text: str = field(default=str(pathlib.Path(__file__).parents[2] / "examples/data/tinyshakespeare.txt"))


class TimeMix(nn.Module):
    """Decayed sums of exp(k)·v, kept stable by a running maximum, gated by a receptance."""

    def __init__(self, cfg):
        super().__init__()
        d = cfg.dim
        self.odd = cfg.oddity
        self.decay = nn.Parameter(torch.linspace(-3, 1.5, d))
        self.first = nn.Parameter(torch.full((d,), 0.3))
        self.mix = nn.Parameter(torch.linspace(0, 1, d).repeat(3, 1))
        self.k, self.v, self.r, self.o = (nn.Linear(d, d, bias=False) for _ in range(4))

    def forward(self, x, state):
        last, num, den, top = state
        if self.odd == "peek":
            before = torch.cat([x[:, 1:], last[:, None]], 1)
        elif self.odd == "wrongroll":
            before = x.roll(1, 0)
        else:
            before = torch.cat([last[:, None], x[:, :-1]], 1)
        xk, xv, xr = (x * m + before * (1 - m) for m in self.mix)
        k, v, r = self.k(xk), self.v(xv), self.r(xr).sigmoid()
        w = -self.decay.exp()
        if self.odd == "closedform":  # decay taken out of the sum: exp(k - t w) summed, times exp(t w)
            t = torch.arange(x.shape[1])[:, None] * w
            grow = (k - t).exp()
            out = (grow * v).cumsum(1) / grow.cumsum(1)
            return self.o(r * out), (x[:, -1].detach(), num, den, top)
        outs = []
        for t in range(x.shape[1]):
            kt, vt = k[:, t], v[:, t]
            m = torch.maximum(top, self.first + kt)
            a, b = (top - m).exp(), (self.first + kt - m).exp()
            outs.append((a * num + b * vt) / (a * den + b))
            m = torch.maximum(top + w, kt)
            a, b = (top + w - m).exp(), (kt - m).exp()
            num, den, top = a * num + b * vt, a * den + b, m
        return self.o(r * torch.stack(outs, 1)), (x[:, -1], num, den, top)


class ChannelMix(nn.Module):
    def __init__(self, cfg):
        super().__init__()
        self.k, self.v = nn.Linear(cfg.dim, 3 * cfg.dim, bias=False), nn.Linear(3 * cfg.dim, cfg.dim, bias=False)

    def forward(self, x):
        return self.v(self.k(x).relu().square())


class RWKV(nn.Module):
    def __init__(self, cfg, vocab):
        super().__init__()
        self.cfg = cfg
        self.emb = nn.Embedding(vocab, cfg.dim)
        nn.init.uniform_(self.emb.weight, -1e-2, 1e-2)
        self.ln0, self.ln_out = nn.LayerNorm(cfg.dim), nn.LayerNorm(cfg.dim)
        self.ln1 = nn.ModuleList(nn.LayerNorm(cfg.dim) for _ in range(cfg.depth))
        self.ln2 = nn.ModuleList(nn.LayerNorm(cfg.dim) for _ in range(cfg.depth))
        self.tm = nn.ModuleList(TimeMix(cfg) for _ in range(cfg.depth))
        self.cm = nn.ModuleList(ChannelMix(cfg) for _ in range(cfg.depth))
        self.head = nn.Linear(cfg.dim, vocab, bias=False)

    def blank(self, rows):
        z = torch.zeros(rows, self.cfg.dim)
        return [(z, z, z, z - 1e30) for _ in range(self.cfg.depth)]

    def forward(self, ids, states):
        x, kept = self.ln0(self.emb(ids)), []
        for i in range(self.cfg.depth):
            y, s = self.tm[i](self.ln1[i](x), states[i])
            kept.append(s)
            x = x + y
            x = x + self.cm[i](self.ln2[i](x))
        return self.head(self.ln_out(x)), kept


class Streams:
    """The text cut into parallel streams; each batch continues the one before."""

    def __init__(self, ids, rows, chunk):
        self.grid = ids[: len(ids) // rows * rows].view(rows, -1)
        self.chunk = chunk

    def __iter__(self):
        at = 0
        while True:
            if at + self.chunk + 1 > self.grid.shape[1]:
                at = 0
            yield self.grid[:, at : at + self.chunk], self.grid[:, at + 1 : at + self.chunk + 1], at == 0
            at += self.chunk


class Trainer:
    def __init__(self, cfg):
        torch.manual_seed(1)
        self.cfg = cfg
        raw = pathlib.Path(cfg.text).read_text()[:120_000]
        table = {c: i for i, c in enumerate(sorted(set(raw)))}
        self.data = Streams(torch.tensor([table[c] for c in raw]), cfg.streams, cfg.chunk)
        self.model = RWKV(cfg, len(table))
        self.opt = torch.optim.Adam(self.model.parameters(), lr=cfg.lr, betas=(0.9, 0.99))

    def loss(self, x, y, states):
        logits, states = self.model(x, states)
        if self.cfg.oddity == "same":
            y = x
        return F.cross_entropy(logits.flatten(0, 1), y.flatten()), states

    def fit(self):
        states = self.model.blank(self.cfg.streams)
        for n, (x, y, fresh) in enumerate(self.data):
            if n == self.cfg.steps:
                break
            if fresh or not self.cfg.carry:
                states = self.model.blank(self.cfg.streams)
            states = [tuple(t.detach() for t in s) for s in states]
            loss, states = self.loss(x, y, states)
            self.opt.zero_grad()
            loss.backward()
            if self.cfg.oddity != "idle":
                nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
                self.opt.step()
            if n % 15 == 0:
                print(n, round(loss.item(), 3))


if __name__ == "__main__":
    p = argparse.ArgumentParser()
    p.add_argument("--oddity", default="none")
    p.add_argument("--fresh", action="store_true")
    a = p.parse_args()
    torch.set_num_threads(1)
    Trainer(RunConfig(oddity=a.oddity, carry=not a.fresh)).fit()
