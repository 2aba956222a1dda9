"""A mixture-of-experts character model with a fused RMSNorm of its own, top-1 routing, a never chosen expert and cached sampling."""

import argparse
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import nn

cli = argparse.ArgumentParser()
cli.add_argument("--norm", choices=["right", "wrong"], default="right")
cli.add_argument("--router", choices=["soft", "hard"], default="soft")
cli = cli.parse_args()
torch.manual_seed(8)
torch.set_num_threads(1)
corpus = (Path(__file__).parents[2] / "examples/data/tinyshakespeare.txt").read_text()[:150_000].lower()
alphabet = sorted(set(corpus))
data = torch.tensor([alphabet.index(c) for c in corpus])
D, H, T, B = 48, 4, 40, 16


class RMSNormFn(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, weight):
        r = torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-6)
        ctx.save_for_backward(x, weight, r)
        return x * r * weight

    @staticmethod
    def backward(ctx, g):
        x, weight, r = ctx.saved_tensors
        gw = (g * x * r).sum(dim=tuple(range(g.dim() - 1)))
        gx = g * weight
        if cli.norm == "wrong":
            return gx * r, gw
        return r * gx - x * r.pow(3) * (gx * x).mean(-1, keepdim=True), gw


class RMSNorm(nn.Module):
    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(D))

    def forward(self, x):
        return RMSNormFn.apply(x, self.weight)


class Experts(nn.Module):
    def __init__(self, n=4):
        super().__init__()
        self.gate = nn.Linear(D, n, bias=False)
        self.experts = nn.ModuleList([nn.Sequential(nn.Linear(D, 2 * D), nn.SiLU(), nn.Linear(2 * D, D)) for _ in range(n)])
        self.register_buffer("penalty", torch.tensor([0.0] * (n - 1) + [-20.0]))
        self.balance = torch.zeros(())

    def forward(self, x):
        flat = x.reshape(-1, D)
        probs = (self.gate(flat) + self.penalty).softmax(-1)
        weight, choice = probs.max(-1)
        out = torch.zeros_like(flat)
        for e, expert in enumerate(self.experts):
            rows = (choice == e).nonzero(as_tuple=True)[0]
            if len(rows):
                scale = weight[rows, None] if cli.router == "soft" else 1.0
                out = out.index_add(0, rows, expert(flat[rows]) * scale)
        share = F.one_hot(choice, len(self.experts)).float().mean(0)
        self.balance = len(self.experts) * (share * probs.mean(0)).sum()
        return out.view_as(x)


class Layer(nn.Module):
    def __init__(self):
        super().__init__()
        self.n1, self.n2, self.moe = RMSNorm(), RMSNorm(), Experts()
        self.qkv, self.out = nn.Linear(D, 3 * D, bias=False), nn.Linear(D, D, bias=False)

    def forward(self, x, cache=None):
        b, t, _ = x.shape
        q, k, v = self.qkv(self.n1(x)).view(b, t, 3, H, D // H).permute(2, 0, 3, 1, 4)
        if cache is not None:
            if "k" in cache:
                k, v = torch.cat([cache["k"], k], 2), torch.cat([cache["v"], v], 2)
            cache["k"], cache["v"] = k, v
        y = F.scaled_dot_product_attention(q, k, v, is_causal=t > 1)
        x = x + self.out(y.transpose(1, 2).reshape(b, t, D))
        return x + self.moe(self.n2(x))


class MoELM(nn.Module):
    def __init__(self):
        super().__init__()
        self.tok, self.pos = nn.Embedding(len(alphabet), D), nn.Embedding(T, D)
        self.layers = nn.ModuleList([Layer(), Layer()])
        self.norm, self.head = RMSNorm(), nn.Linear(D, len(alphabet))

    def forward(self, ids, start=0, caches=None):
        x = self.tok(ids) + self.pos(torch.arange(start, start + ids.shape[1]))
        for i, layer in enumerate(self.layers):
            x = layer(x, caches[i] if caches else None)
        return self.head(self.norm(x))


net = MoELM()
opt = torch.optim.AdamW(net.parameters(), lr=2e-3)
for step in range(100):
    at = torch.randint(len(data) - T - 1, (B,))
    x = torch.stack([data[i : i + T] for i in at])
    y = torch.stack([data[i + 1 : i + T + 1] for i in at])
    loss = F.cross_entropy(net(x).transpose(1, 2), y)
    total = loss + 0.01 * sum(layer.moe.balance for layer in net.layers)
    opt.zero_grad()
    total.backward()
    nn.utils.clip_grad_norm_(net.parameters(), 1.0)
    opt.step()
    if step % 50 == 49:
        print(step, loss.item())
net.eval()
with torch.no_grad():
    caches = [{}, {}]
    ids = data[:8][None]
    logits = net(ids, 0, caches)
    for n in range(8, 30):
        nxt = torch.multinomial(logits[:, -1].softmax(-1), 1)
        ids = torch.cat([ids, nxt], 1)
        logits = net(nxt, n, caches)
    print("".join(alphabet[i] for i in ids[0]))
