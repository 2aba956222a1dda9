"""Pretraining with a nested config; override anything: `python fresh1_hydra.py optim.lr=1e-3 model.depth=3`."""
from __future__ import annotations

import copy
import inspect
import logging
import math
import sys
from dataclasses import dataclass, field, fields, is_dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

log = logging.getLogger("pretrain")


@dataclass
class ModelCfg:
    width: int = 64
    depth: int = 2
    heads: int = 4
    ctx: int = 48
    dropout: float = 0.0
    init_std: float = 0.02
    tie: bool = True


@dataclass
class OptimCfg:
    lr: float = 2e-3
    wd: float = 0.05
    betas: tuple = (0.9, 0.95)
    clip: float = 1.0


@dataclass
class SchedCfg:
    warmup: int = 20
    total: int = 120
    floor: float = 0.1
    clamp: bool = True
    per: str = "update"


@dataclass
class TrainCfg:
    updates: int = 120
    micro: int = 8
    accumulate: int = 2
    eval_every: int = 40
    ema: float = 0.98
    autocast: bool = False
    seed: int = 7


@dataclass
class Cfg:
    model: ModelCfg = field(default_factory=ModelCfg)
    optim: OptimCfg = field(default_factory=OptimCfg)
    sched: SchedCfg = field(default_factory=SchedCfg)
    train: TrainCfg = field(default_factory=TrainCfg)


def override(cfg, dotted: list[str]):
    for item in dotted:
        key, raw = item.split("=", 1)
        *path, leaf = key.split(".")
        node = cfg
        for part in path:
            node = getattr(node, part)
        old = getattr(node, leaf)
        setattr(node, leaf, raw.lower() in ("1", "true") if isinstance(old, bool) else type(old)(raw))
    return cfg


def corpus() -> str:
    import argparse, difflib, json, textwrap, unittest.case, statistics, string

    docs = []
    for module in (argparse, difflib, json, textwrap, unittest.case, statistics, string):
        docs.append(inspect.getdoc(module) or "")
        for name, thing in sorted(vars(module).items()):
            if inspect.isclass(thing) or inspect.isfunction(thing):
                docs.append(inspect.getdoc(thing) or "")
                if inspect.isclass(thing):
                    docs += [inspect.getdoc(m) or "" for _, m in sorted(vars(thing).items()) if inspect.isfunction(m)]
    return "\n\n".join(d for d in docs if d)


class Attention(nn.Module):
    def __init__(self, c: ModelCfg):
        super().__init__()
        self.heads = c.heads
        self.q, self.k, self.v, self.o = (nn.Linear(c.width, c.width, bias=False) for _ in range(4))

    def forward(self, x: Tensor) -> Tensor:
        b, t, d = x.shape
        q, k, v = (f(x).view(b, t, self.heads, -1).transpose(1, 2) for f in (self.q, self.k, self.v))
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        return self.o(y.transpose(1, 2).reshape(b, t, d))


class Layer(nn.Module):
    def __init__(self, c: ModelCfg):
        super().__init__()
        self.n1, self.n2 = nn.LayerNorm(c.width), nn.LayerNorm(c.width)
        self.attn = Attention(c)
        self.mlp = nn.Sequential(nn.Linear(c.width, 4 * c.width), nn.GELU(), nn.Linear(4 * c.width, c.width), nn.Dropout(c.dropout))

    def forward(self, x):
        x = x + self.attn(self.n1(x))
        return x + self.mlp(self.n2(x))


class Decoder(nn.Module):
    def __init__(self, c: ModelCfg, vocab: int):
        super().__init__()
        self.tok, self.pos = nn.Embedding(vocab, c.width), nn.Embedding(c.ctx, c.width)
        self.layers = nn.ModuleList([Layer(c) for _ in range(c.depth)])
        self.norm = nn.LayerNorm(c.width)
        self.out = nn.Linear(c.width, vocab, bias=False)
        for p in self.parameters():
            if p.dim() > 1:
                nn.init.normal_(p, std=c.init_std)
        if c.tie:
            self.out.weight = self.tok.weight

    def forward(self, ids):
        x = self.tok(ids) + self.pos.weight[: ids.shape[1]]
        for layer in self.layers:
            x = layer(x)
        return self.out(self.norm(x))


class Trainer:
    def __init__(self, cfg: Cfg):
        self.cfg = cfg
        torch.manual_seed(cfg.train.seed)
        text = corpus()
        self.stoi = {ch: i for i, ch in enumerate(sorted(set(text)))}
        data = torch.tensor([self.stoi[ch] for ch in text])
        cut = int(0.9 * len(data))
        self.splits = {"train": data[:cut], "val": data[cut:]}
        self.model = Decoder(cfg.model, len(self.stoi))
        self.shadow = copy.deepcopy(self.model).requires_grad_(False)
        decay = [p for p in self.model.parameters() if p.dim() > 1]
        rest = [p for p in self.model.parameters() if p.dim() <= 1]
        self.opt = torch.optim.AdamW(
            [{"params": decay, "weight_decay": cfg.optim.wd}, {"params": rest, "weight_decay": 0.0}], lr=cfg.optim.lr, betas=cfg.optim.betas
        )
        self.sched = torch.optim.lr_scheduler.LambdaLR(self.opt, self.factor)

    def factor(self, n: int) -> float:
        s = self.cfg.sched
        if n < s.warmup:
            return (n + 1) / s.warmup
        done = (n - s.warmup) / max(1, s.total - s.warmup)
        if s.clamp:
            done = min(1.0, done)
        return s.floor + (1 - s.floor) * 0.5 * (1 + math.cos(math.pi * done))

    def batch(self, split):
        data, c = self.splits[split], self.cfg
        at = torch.randint(len(data) - c.model.ctx - 1, (c.train.micro,))
        rows = torch.stack([data[i : i + c.model.ctx + 1] for i in at])
        return rows[:, :-1], rows[:, 1:]

    def loss(self, model, split):
        x, y = self.batch(split)
        with torch.autocast("cpu", torch.bfloat16, enabled=self.cfg.train.autocast):
            logits = model(x)
        return F.cross_entropy(logits.float().flatten(0, 1), y.flatten())

    @torch.inference_mode()
    def evaluate(self, model):
        model.eval()
        score = sum(self.loss(model, "val").item() for _ in range(8)) / 8
        model.train()
        return score

    @torch.no_grad()
    def average(self):
        for mine, theirs in zip(self.shadow.parameters(), self.model.parameters()):
            mine.lerp_(theirs, 1 - self.cfg.train.ema)

    def fit(self):
        c = self.cfg
        for update in range(1, c.train.updates + 1):
            total = 0.0
            for _ in range(c.train.accumulate):
                loss = self.loss(self.model, "train") / c.train.accumulate
                loss.backward()
                total += loss.item()
                if c.sched.per == "micro":
                    self.sched.step()
            nn.utils.clip_grad_norm_(self.model.parameters(), c.optim.clip)
            self.opt.step()
            self.opt.zero_grad(set_to_none=True)
            if c.sched.per == "update":
                self.sched.step()
            self.average()
            if update % c.train.eval_every == 0:
                log.info("%d train %.3f val %.3f ema %.3f lr %.2e", update, total, self.evaluate(self.model), self.evaluate(self.shadow), self.sched.get_last_lr()[0])


if __name__ == "__main__":
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    import warnings

    warnings.filterwarnings("ignore", message="Detected call of")
    Trainer(override(Cfg(), sys.argv[1:])).fit()
