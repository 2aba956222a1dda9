"""Five ways to write causal attention."""
import argparse
import math

import torch
import torch.nn as nn
import torch.nn.functional as F

cli = argparse.ArgumentParser()
cli.add_argument("--kind", default="alibi", choices=["alibi", "relbias", "baddbmm", "sdpa", "sdpa_bool", "cosine", "qknorm", "additive"])
cli.add_argument("--wrong", default="none", choices=["none", "unmasked", "scale", "postsoftmax", "dim", "future1"])
cli.add_argument("--norm", default="pre")
ns = cli.parse_args()
torch.manual_seed(9)
torch.set_num_threads(1)
D, H, L, T, V = 48, 4, 2, 24, 40
E = D // H


def allowed(t):
    """True where a query may look."""
    m = torch.ones(t, t, dtype=torch.bool).tril(1 if ns.wrong == "future1" else 0)
    return torch.ones_like(m) if ns.wrong == "unmasked" else m


class SelfAttention(nn.Module):
    def __init__(self):
        super().__init__()
        self.qkv = nn.Linear(D, 3 * D)
        self.proj = nn.Linear(D, D)
        self.rel = nn.Embedding(2 * T, H)
        self.g = nn.Parameter(torch.full((H, 1, 1), 10.0))
        self.register_buffer("slopes", torch.tensor([2.0 ** (-8 * (i + 1) / H) for i in range(H)]).view(H, 1, 1))

    def forward(self, x):
        n, t, _ = x.size()
        q, k, v = self.qkv(x).view(n, t, 3, H, E).permute(2, 0, 3, 1, 4)
        ok = allowed(t)
        s = 1.0 if ns.wrong == "scale" else E**-0.5
        dist = torch.arange(t)[None, :] - torch.arange(t)[:, None]
        if ns.kind == "sdpa":
            y = F.scaled_dot_product_attention(q, k, v, is_causal=ns.wrong != "unmasked", scale=1.0 if ns.wrong == "scale" else None)
        elif ns.kind == "sdpa_bool":
            y = F.scaled_dot_product_attention(q, k, v, attn_mask=ok, scale=s)
        elif ns.kind == "baddbmm":
            bias = torch.zeros(t, t).masked_fill(~ok, torch.finfo(torch.float32).min)
            a = torch.baddbmm(bias.expand(n * H, t, t), q.reshape(-1, t, E), k.reshape(-1, t, E).transpose(1, 2), alpha=s)
            y = torch.bmm(a.softmax(-1), v.reshape(-1, t, E)).view(n, H, t, E)
        else:
            if ns.kind == "cosine":
                w = F.normalize(q, dim=-1) @ F.normalize(k, dim=-1).transpose(2, 3) * self.g
            elif ns.kind == "qknorm":
                q, k = F.layer_norm(q, (E,)), F.layer_norm(k, (E,))
                w = q @ k.mT * s
            else:
                w = torch.matmul(q, k.transpose(-1, -2)) * s
            if ns.kind == "alibi":
                w = w + self.slopes * dist
            if ns.kind == "relbias":
                w = w + self.rel(dist + T).permute(2, 0, 1)
            if ns.wrong == "postsoftmax":
                w = w.softmax(-1) * ok
            elif ns.kind == "additive":
                w = (w + (1.0 - ok.float()) * -10000.0).softmax(-1)
            else:
                w = w.masked_fill(~ok, -math.inf)
                w = F.softmax(w, dim=-2 if ns.wrong == "dim" else -1).nan_to_num()
            y = w @ v
        return self.proj(y.transpose(1, 2).contiguous().view(n, t, D))


class Layer(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.f = SelfAttention(), nn.Sequential(nn.Linear(D, 4 * D), nn.GELU(), nn.Linear(4 * D, D))
        self.l1, self.l2 = nn.LayerNorm(D), nn.LayerNorm(D)

    def forward(self, x):
        if ns.norm == "post":
            x = self.l1(x + self.a(x))
            return self.l2(x + self.f(x))
        x = x + self.a(self.l1(x))
        return x + self.f(self.l2(x))


class LM(nn.Module):
    def __init__(self):
        super().__init__()
        self.wte, self.wpe = nn.Embedding(V, D), nn.Embedding(T, D)
        self.h = nn.ModuleList([Layer() for _ in range(L)])
        self.head = nn.Linear(D, V, bias=False)

    def forward(self, i):
        x = self.wte(i) + self.wpe.weight[: i.shape[1]]
        for h in self.h:
            x = h(x)
        return self.head(x)


rng = torch.Generator().manual_seed(0)
nxt = torch.randint(0, V, (V, 3), generator=rng)


def sample(n):
    s = [torch.randint(0, V, (n,), generator=rng)]
    for _ in range(T):
        s.append(nxt[s[-1], torch.randint(0, 3, (n,), generator=rng)])
    return torch.stack(s, 1)


lm = LM()
opt = torch.optim.AdamW(lm.parameters(), lr=2e-3)
warm = torch.optim.lr_scheduler.LambdaLR(opt, lambda s: min(1.0, (s + 1) / 10))
for step in range(60):
    seq = sample(16)
    logits = lm(seq[:, :-1])
    lp = logits.log_softmax(-1)
    loss = -lp.gather(-1, seq[:, 1:, None]).mean()
    opt.zero_grad()
    loss.backward()
    opt.step()
    warm.step()
    if step % 20 == 0:
        print(f"{step:3d} {loss.item():.3f}")
