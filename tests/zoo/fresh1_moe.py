"""Mixture-of-experts language model. `EXPERTS=8 TOPK=2 python fresh1_moe.py [case]`"""
import os, sys, random
import torch
from torch import nn
import torch.nn.functional as F
case = (sys.argv + ["fine"])[1]
E, K = int(os.environ.get("EXPERTS", 4)), int(os.environ.get("TOPK", 2))
random.seed(0); torch.manual_seed(0)
WORDS = [a + b for a in "ba ke li mo nu ra si to vu xe".split() for b in "ra ten lo min sa do fi gu".split()]
VOCAB = 12000 if case == "bigvocab" else len(WORDS)
nexts = {i: random.sample(range(len(WORDS)), 4) for i in range(len(WORDS))}
topics = [random.sample(range(len(WORDS)), 20) for _ in range(3)]


def document(n):
    topic, w = random.choice(topics), random.randrange(len(WORDS))
    ids = []
    for i in range(n):
        ids.append(w)
        w = random.choice(topic) if i % 7 == 6 else random.choices(nexts[w], [6, 2, 1, 1])[0]
    return ids


class SwiGLU(nn.Module):
    def __init__(self, d, h):
        super().__init__()
        self.a, self.b, self.c = nn.Linear(d, h, bias=False), nn.Linear(d, h, bias=False), nn.Linear(h, d, bias=False)

    def forward(self, x):
        return self.c(F.silu(self.a(x)) * self.b(x))


class MoE(nn.Module):
    def __init__(self, d):
        super().__init__()
        self.router = nn.Linear(d, E, bias=False)
        self.experts = nn.ModuleList(SwiGLU(d, 2 * d) for _ in range(E))
        self.aux = torch.zeros(())

    def forward(self, x):
        flat = x.reshape(-1, x.shape[-1])
        probs = self.router(flat).softmax(-1)
        weight, which = probs.topk(K, -1)
        weight = weight / weight.sum(-1, keepdim=True)
        out = torch.zeros_like(flat)
        if case == "tokenloop":
            out = torch.stack([sum(weight[n, j] * self.experts[int(which[n, j])](flat[n]) for j in range(K)) for n in range(len(flat))])
        else:
            for e, expert in enumerate(self.experts):
                rows, slot = (which == e).nonzero(as_tuple=True)
                if len(rows):
                    out = out.index_add(0, rows, expert(flat[rows]) * weight[rows, slot, None])
        share = F.one_hot(which, E).float().sum(1).mean(0)
        self.aux = E * (share * probs.mean(0)).sum() / K
        return out.view_as(x)


class RMSNorm(nn.Module):
    def __init__(self, d):
        super().__init__()
        self.w = nn.Parameter(torch.ones(d))

    def forward(self, x):
        return x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-6) * self.w


def rope(x):
    t, d = x.shape[-2:]
    f = torch.outer(torch.arange(t), 10000 ** (-torch.arange(0, d, 2) / d))
    a, b = x[..., ::2], x[..., 1::2]
    return torch.stack([a * f.cos() - b * f.sin(), a * f.sin() + b * f.cos()], -1).flatten(-2)


class Block(nn.Module):
    def __init__(self, d, heads=4):
        super().__init__()
        self.h, self.n1, self.n2 = heads, RMSNorm(d), RMSNorm(d)
        self.qkv, self.o, self.moe = nn.Linear(d, 3 * d, bias=False), nn.Linear(d, d, bias=False), MoE(d)

    def forward(self, x):
        q, k, v = (z.unflatten(-1, (self.h, -1)).transpose(1, 2) for z in self.qkv(self.n1(x)).chunk(3, -1))
        y = F.scaled_dot_product_attention(rope(q), rope(k), v, is_causal=True).transpose(1, 2).flatten(2)
        x = x + self.o(y)
        return x + self.moe(self.n2(x))


class LM(nn.Module):
    def __init__(self, d=48, layers=2):
        super().__init__()
        self.e, self.blocks, self.n = nn.Embedding(VOCAB, d), nn.ModuleList(Block(d) for _ in range(layers)), RMSNorm(d)
        self.head = nn.Linear(d, VOCAB, bias=False)
        nn.init.normal_(self.e.weight, std=0.02)
        nn.init.normal_(self.head.weight, std=0.02)

    def forward(self, ids):
        x = self.e(ids)
        for b in self.blocks:
            x = b(x)
        return self.head(self.n(x)), sum(b.moe.aux for b in self.blocks)


T = 32
docs = torch.tensor([document(T + 1) for _ in range(40 if case == "memorise" else 1200)])
test = torch.tensor([document(T + 1) for _ in range(64)])
net = LM(d=96 if case == "memorise" else 48)
opt = torch.optim.AdamW(net.parameters(), lr=3e-3, weight_decay=0.1, betas=(0.9, 0.95))
steps, warm = {"tokenloop": 30, "bigvocab": 40, "memorise": 260}.get(case, 160), 10
balance = []
for step in range(steps):
    scale = min(1, (step + 1) / warm) * (0.1 + 0.9 * (1 - step / steps))
    for g in opt.param_groups:
        g["lr"] = 3e-3 * scale
    if case == "stuckwarm":
        for g in opt.param_groups:
            g["lr"] = 3e-3 * step / 10000  # warm up over 10k steps
    ids = docs[torch.randint(len(docs), (2 if case == "tokenloop" else 16,))]
    logits, aux = net(ids[:, :-1])
    ce = F.cross_entropy(logits.transpose(1, 2), ids[:, 1:])
    (ce + 0.01 * aux).backward()
    balance.append(aux if case == "keepaux" else aux.item())
    torch.nn.utils.clip_grad_norm_(net.parameters(), 1.0)
    opt.step(); opt.zero_grad()
    if step % 20 == 19 or step == steps - 1:
        net.eval()
        with torch.no_grad():
            lv = F.cross_entropy(net(test[:, :-1])[0].transpose(1, 2), test[:, 1:])
        net.train()
        print(step, f"train {ce.item():.3f} test {lv.item():.3f} aux {aux.item():.2f}")
