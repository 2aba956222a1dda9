"""Everything as functions: parameters are a pytree, gradients come from torch.func, updates are written out."""
import math
import sys
from typing import NamedTuple

import torch
from torch.func import functional_call, grad_and_value, vmap

opts = dict(kv.split(":") for kv in sys.argv[1:])
LR = float(opts.get("lr", 2e-3))
STEPS = int(opts.get("steps", 150))
INIT = float(opts.get("init", 0.02))
STYLE = opts.get("style", "module")
OPTIM = opts.get("optim", "adam")
torch.manual_seed(1)
V, T, D, H = 40, 24, 48, 4


class AdamState(NamedTuple):
    step: int
    m: dict
    v: dict


def dense(n_in, n_out, scale=1.0):
    return torch.randn(n_in, n_out) * INIT * scale


def init(layers=2):
    p = {"wte": dense(V, D), "wpe": dense(T, D), "g": torch.ones(D), "b": torch.zeros(D)}
    for i in range(layers):
        p |= {f"{i}.g1": torch.ones(D), f"{i}.b1": torch.zeros(D), f"{i}.g2": torch.ones(D), f"{i}.b2": torch.zeros(D)}
        p |= {f"{i}.qkv": dense(D, 3 * D), f"{i}.o": dense(D, D, 1 / math.sqrt(2 * layers))}
        p |= {f"{i}.up": dense(D, 4 * D), f"{i}.down": dense(4 * D, D, 1 / math.sqrt(2 * layers))}
    return p


def norm(x, g, b):
    return (x - x.mean(-1, keepdim=True)) / torch.sqrt(x.var(-1, keepdim=True, unbiased=False) + 1e-5) * g + b


def apply(p, ids, layers=2):
    """ids (T,) -> logits (T, V)"""
    t = ids.shape[-1]
    x = p["wte"][ids] + p["wpe"][:t]
    bias = torch.triu(torch.full((t, t), float("-inf")), 1)
    for i in range(layers):
        q, k, v = (norm(x, p[f"{i}.g1"], p[f"{i}.b1"]) @ p[f"{i}.qkv"]).unflatten(-1, (3, H, D // H)).unbind(-3)
        s = torch.einsum("...qhd,...khd->...hqk", q, k) / math.sqrt(D // H) + bias
        x = x + torch.einsum("...hqk,...khd->...qhd", s.softmax(-1), v).flatten(-2) @ p[f"{i}.o"]
        x = x + torch.nn.functional.gelu(norm(x, p[f"{i}.g2"], p[f"{i}.b2"]) @ p[f"{i}.up"]) @ p[f"{i}.down"]
    return norm(x, p["g"], p["b"]) @ p["wte"].T


def nll(logits, y):
    return -logits.log_softmax(-1).gather(-1, y[..., None]).mean()


def loss_batched(p, x, y):
    return nll(apply(p, x), y)


def loss_vmapped(p, x, y):
    return vmap(lambda a, b: nll(apply(p, a), b))(x, y).mean()


def loss_rows(p, x, y):
    return torch.stack([nll(apply(p, a), b) for a, b in zip(x, y)]).mean()


def adam_init(p):
    return AdamState(0, {k: torch.zeros_like(v) for k, v in p.items()}, {k: torch.zeros_like(v) for k, v in p.items()})


def adam(p, g, s, lr, b1=0.9, b2=0.98, eps=1e-8):
    n = s.step + 1
    m = {k: b1 * s.m[k] + (1 - b1) * g[k] for k in p}
    v = {k: b2 * s.v[k] + (1 - b2) * g[k] ** 2 for k in p}
    new = {k: p[k] - lr * (m[k] / (1 - b1**n)) / ((v[k] / (1 - b2**n)).sqrt() + eps) for k in p}
    return new, AdamState(n, m, v)


def sgd(p, g, s, lr):
    return {k: p[k] - lr * g[k] for k in p}, s


def chain(n):
    """Rows of a second-order chain: the next is a + b or a - b mod V, b decides."""
    x = torch.randint(V, (n, T + 1))
    for t in range(2, T + 1):
        x[:, t] = torch.where(x[:, t - 1] % 3 == 0, x[:, t - 2] + 1, x[:, t - 1] + 3) % V
    return x


def main():
    p = init()
    s = adam_init(p)
    loss = {"module": loss_batched, "vmap": loss_vmapped, "rows": loss_rows}[STYLE]
    update = adam if OPTIM == "adam" else sgd
    step = grad_and_value(loss)
    for i in range(STEPS):
        lr = LR * min(1.0, (i + 1) / 15)
        rows = chain(16)
        g, value = step(p, rows[:, :-1], rows[:, 1:])
        p, s = update(p, g, s, lr)
        if i % 25 == 0:
            print(i, round(value.item(), 4))
    print("final", value.item(), "of", math.log(V))


class Stack(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.emb = torch.nn.Embedding(V, D)
        self.pos = torch.nn.Parameter(torch.randn(T, D) * INIT)
        self.enc = torch.nn.TransformerEncoder(torch.nn.TransformerEncoderLayer(D, H, 4 * D, 0.0, "gelu", batch_first=True, norm_first=True), 2, enable_nested_tensor=False)
        self.out = torch.nn.Linear(D, V)

    def forward(self, x):
        t = x.shape[-1]
        return self.out(self.enc(self.emb(x) + self.pos[:t], mask=torch.nn.Transformer.generate_square_subsequent_mask(t), is_causal=True))


def main_module():
    """The same with a module's parameters through functional_call and a torch optimizer over the leaves."""
    net = Stack()
    leaves = dict(net.named_parameters())
    opt = torch.optim.AdamW(leaves.values(), lr=LR)
    rows_style = opts.get("forward") == "rows"
    for i in range(STEPS):
        rows = chain(16)
        x, y = rows[:, :-1], rows[:, 1:]
        if rows_style:
            logits = torch.cat([functional_call(net, leaves, (x[j : j + 1],)) for j in range(len(x))])
        else:
            logits = functional_call(net, leaves, (x,))
        value = nll(logits, y)
        for leaf, g in zip(leaves.values(), torch.autograd.grad(value, list(leaves.values()))):
            leaf.grad = g
        opt.step()
        if i % 25 == 0:
            print(i, round(value.item(), 4))


main_module() if STYLE == "call" else main()
