"""Deep stacks in functional style: parameters in a dict, one function per part."""
import argparse
import math
import os

import torch
import torch.nn.functional as F

p = argparse.ArgumentParser()
p.add_argument("kind", nargs="?", default="rezero")  # rezero, prenorm, plain, sigmoid, gated
p.add_argument("--layers", type=int, default=12)
p.add_argument("--steps", type=int, default=120)
p.add_argument("--lr", type=float, default=2e-3)
p.add_argument("--scale", type=float, default=1.0)
p.add_argument("--opt", default="adam")
p.add_argument("--ramp", type=float, default=0.0, help="multiply the rate by this each step")
a = p.parse_args()
torch.manual_seed(1)
text = open(os.path.join(os.path.dirname(os.path.abspath(__file__)), "..", "..", "examples", "data", "tinyshakespeare.txt")).read()[:60000].lower()
letters = sorted(set(text))
data = torch.tensor([letters.index(c) for c in text])
V, D, T, B, H = len(letters), 32, 32, 12, 2


def weight(*shape, std=None):
    return (torch.randn(*shape) * (shape[-1] ** -0.5 if std is None else std) * a.scale).requires_grad_()


W = {"tok": weight(V, D, std=0.05), "pos": weight(T, D, std=0.05), "head": weight(V, D)}
for l in range(a.layers):
    W |= {f"{l}.qkv": weight(3 * D, D), f"{l}.o": weight(D, D), f"{l}.up": weight(2 * D, D), f"{l}.down": weight(D, 2 * D)}
    W |= {f"{l}.{n}": torch.ones(D, requires_grad=True) for n in ("n1", "n2")} if a.kind in ("prenorm", "gated") else {}
    W |= {f"{l}.alpha": torch.zeros((), requires_grad=True)} if a.kind == "rezero" else {}


def rms(x, g):
    return x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-6) * g


def attention(x, l):
    b, t, _ = x.shape
    q, k, v = F.linear(x, W[f"{l}.qkv"]).view(b, t, 3, H, D // H).permute(2, 0, 3, 1, 4)
    s = (q @ k.mT / math.sqrt(D // H)).masked_fill(torch.ones(t, t).triu(1).bool(), -1e9)
    return F.linear((s.softmax(-1) @ v).transpose(1, 2).reshape(b, t, D), W[f"{l}.o"])


def mlp(x, l):
    act = torch.sigmoid if a.kind == "sigmoid" else F.gelu
    return F.linear(act(F.linear(x, W[f"{l}.up"])), W[f"{l}.down"])


def forward(ids):
    x = W["tok"][ids] + W["pos"][: ids.shape[1]]
    for l in range(a.layers):
        if a.kind == "rezero":
            x = x + W[f"{l}.alpha"] * attention(x, l)
            x = x + W[f"{l}.alpha"] * mlp(x, l)
        elif a.kind == "prenorm":
            x = x + attention(rms(x, W[f"{l}.n1"]), l) / math.sqrt(2 * a.layers)
            x = x + mlp(rms(x, W[f"{l}.n2"]), l) / math.sqrt(2 * a.layers)
        elif a.kind == "gated":
            x = rms(x + attention(x, l), W[f"{l}.n1"])
            x = rms(x + mlp(x, l), W[f"{l}.n2"])
        elif a.kind == "sigmoid":
            x = torch.sigmoid(mlp(torch.tanh(attention(x, l)), l))
        else:
            x = mlp(x + attention(x, l), l)
    return F.linear(x, W["head"])


params = list(W.values())
opt = torch.optim.Adam(params, lr=a.lr) if a.opt == "adam" else torch.optim.SGD(params, lr=a.lr, momentum=0.9)
for step in range(a.steps):
    i = torch.randint(0, len(data) - T - 1, (B,)).tolist()
    x, y = torch.stack([data[j : j + T] for j in i]), torch.stack([data[j + 1 : j + T + 1] for j in i])
    loss = F.cross_entropy(forward(x).view(-1, V), y.view(-1))
    opt.zero_grad()
    loss.backward()
    opt.step()
    if a.ramp:
        for g in opt.param_groups:
            g["lr"] *= a.ramp
    if step % 10 == 0:
        print(f"{step:4d} loss {loss.item():.4f}  |g| {sum(float(q.grad.norm()) ** 2 for q in params if q.grad is not None) ** 0.5:.2e}")
print("end", loss.item(), "uniform", math.log(V))
