"""One decoder, three cheap attentions: Performer features, a sliding window with ALiBi, relu kernels; half precision too."""

import math
import pathlib
import sys

import torch
import torch.nn.functional as F
from torch import nn

kw = dict(part.split("=", 1) for part in sys.argv[1:])
kind, bad, prec = kw.get("kind", "window"), kw.get("bad", ""), kw.get("prec", "fp32")
torch.manual_seed(13)
torch.set_num_threads(1)
T, D, H, W = 64, 64, 4, 16
text = (pathlib.Path(__file__).parents[2] / "examples/data/tinyshakespeare.txt").read_bytes()[:150_000]
data = torch.tensor(list(text))


def heads(x):
    return x.view(x.shape[0], T, H, D // H).transpose(1, 2)


class Window(nn.Module):
    """Position i sees i-W+1..i; a penalty grows with distance, by head."""

    def __init__(self):
        super().__init__()
        i, j = torch.arange(T)[:, None], torch.arange(T)[None]
        near = (j <= i) & (j > i - W)
        if bad == "centred":
            near = (j <= i + W // 2) & (j > i - W // 2)
        slopes = 2.0 ** -torch.arange(1, H + 1)
        bias = -(i - j).abs() * slopes[:, None, None]
        self.register_buffer("bias", bias.masked_fill(~near, -torch.inf))

    def forward(self, q, k, v):
        s = q @ k.mT / math.sqrt(D // H) + self.bias.to(q.dtype)
        return F.dropout(s.softmax(-1), 0.1, self.training) @ v


class Performer(nn.Module):
    """Positive random features, summed causally."""

    def __init__(self, features=32):
        super().__init__()
        self.register_buffer("omega", torch.randn(features, D // H))

    def phi(self, x):
        x = x * (D // H) ** -0.25
        u = x @ self.omega.T - x.square().sum(-1, keepdim=True) / 2
        if bad == "raw":
            return ((x * 8) @ self.omega.T * 2).exp()
        return u.exp() + 1e-4  # no maximum over keys: it would tell the past of the future

    def forward(self, q, k, v):
        q, k = self.phi(q), self.phi(k)
        kv = torch.einsum("bhtf,bhtd->bhtfd", k, v).cumsum(2)
        norm = k.cumsum(2)
        return torch.einsum("bhtf,bhtfd->bhtd", q, kv) / torch.einsum("bhtf,bhtf->bht", q, norm)[..., None]


class ReluKernel(nn.Module):
    """q and k made non-negative; the sum over the past is normalised by its weights."""

    def forward(self, q, k, v):
        q, k = F.relu(q), F.relu(k)
        a = (q @ k.mT).tril()
        if bad == "empty":
            return a @ v / a.sum(-1, keepdim=True)
        return a @ v / (a.sum(-1, keepdim=True) + 1e-6)


class Layer(nn.Module):
    def __init__(self):
        super().__init__()
        self.mix = {"window": Window, "performer": Performer, "relu": ReluKernel}[kind]()
        self.qkv, self.o = nn.Linear(D, 3 * D), nn.Linear(D, D)
        self.ff = nn.Sequential(nn.Linear(D, 4 * D), nn.GELU(), nn.Linear(4 * D, D), nn.Dropout(0.1))
        self.n1, self.n2 = nn.LayerNorm(D), nn.LayerNorm(D)

    def forward(self, x):
        q, k, v = map(heads, self.qkv(self.n1(x)).chunk(3, -1))
        y = self.mix(q, k, v)
        y = y.reshape(x.shape) if bad == "notranspose" else y.transpose(1, 2).reshape(x.shape)
        x = x + self.o(y)
        return x + self.ff(self.n2(x))


class LM(nn.Module):
    def __init__(self):
        super().__init__()
        self.wte = nn.Embedding(256, D)
        self.layers = nn.Sequential(*[Layer() for _ in range(3)])
        self.nf = nn.LayerNorm(D)
        nn.init.normal_(self.wte.weight, std=0.05)

    def forward(self, ids):
        return F.linear(self.nf(self.layers(self.wte(ids))), self.wte.weight)


lm = LM()
if prec == "bf16":
    lm = lm.bfloat16()
optimizer = torch.optim.AdamW(lm.parameters(), lr=2e-3 if prec != "bf16" else 4e-3)
scaler = torch.amp.GradScaler("cpu", enabled=prec == "fp16", init_scale=2.0**10)
steps = int(kw.get("steps", 90))
anneal = torch.optim.lr_scheduler.SequentialLR(
    optimizer,
    [torch.optim.lr_scheduler.LinearLR(optimizer, 0.1, 1.0, 10), torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps - 10, 2e-4)],
    [10],
)
amp = {"fp16": torch.float16, "autocast": torch.bfloat16}.get(prec)
for n in range(steps):
    at = torch.randint(0, len(data) - T - 1, (16,))
    x = torch.stack([data[i : i + T] for i in at])
    y = torch.stack([data[i + 1 : i + T + 1] for i in at])
    with torch.autocast("cpu", dtype=amp or torch.bfloat16, enabled=amp is not None):
        logits = lm(x)
    loss = F.cross_entropy(logits.float().view(-1, 256), y.view(-1))
    optimizer.zero_grad()
    scaler.scale(loss).backward()
    if bad != "clipscaled":
        scaler.unscale_(optimizer)
    nn.utils.clip_grad_norm_(lm.parameters(), 1.0)
    scaler.step(optimizer)
    scaler.update()
    anneal.step()
    if n % 20 == 0:
        print(n, f"{loss.item():.3f}")
