"""Character model with its own sampling loops: the whole context, a key-value cache, a buffer filled in place, or a second forward."""

import argparse
import math
import random

import torch
import torch.nn as nn
import torch.nn.functional as F

p = argparse.ArgumentParser()
p.add_argument("--loop", default="whole", choices=["whole", "cached", "buffer", "by_parts", "relist"])
p.add_argument("--decode", default="sample", choices=["sample", "greedy", "hot", "cool", "times", "topk"])
p.add_argument("--text", default="people", choices=["people", "verse", "count"])
p.add_argument("--wrong", default="")
p.add_argument("--steps", type=int, default=220)
p.add_argument("--n", type=int, default=150)
p.add_argument("--during", action="store_true", help="samples while it trains")
p.add_argument("--lr", type=float, default=4e-3)
a = p.parse_args()
torch.manual_seed(3)
rng = random.Random(1)
if a.text == "people":
    who = "Anna Boris the_king a_sailor my_aunt Clara old_Tom nobody the_twins".split()
    did = "finds sells hides paints eats loses breaks likes carries wants".split()
    what = "a lamp|two eggs|the map|some bread|her coat|an old ship|nine stones|a quiet song|the key".split("|")
    when = "at noon|by the sea|in May|for a week|every night|with joy".split("|")
    text = " ".join(f"{rng.choice(who)} {rng.choice(did)} {rng.choice(what)} {rng.choice(when)}.\n" for _ in range(900))
elif a.text == "verse":
    text = "row, row, row your boat, merrily merrily merrily, life is but a dream.\n" * 220
else:
    text = "".join(f"{i % 10}" * 3 for i in range(5000))
chars = sorted(set(text))
V, T, D, H, L = len(chars), 48, 48, 4, 2
data = torch.tensor([chars.index(c) for c in text])


class Attn(nn.Module):
    def __init__(self):
        super().__init__()
        self.qkv, self.o = nn.Linear(D, 3 * D, bias=False), nn.Linear(D, D, bias=False)

    def forward(self, x, past=None):
        b, t, _ = x.shape
        q, k, v = (y.view(b, t, H, D // H).transpose(1, 2) for y in self.qkv(x).chunk(3, -1))
        if past is not None:
            k, v = torch.cat([past[0], k], 2), torch.cat([past[1], v], 2)
        s = q @ k.transpose(-2, -1) / math.sqrt(D // H)
        keep = torch.ones(t, k.shape[2], dtype=torch.bool).tril(k.shape[2] - t)
        y = s.masked_fill(~keep, float("-inf")).softmax(-1) @ v
        return self.o(y.transpose(1, 2).reshape(b, t, D)), (k, v)


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.n1, self.n2, self.at = nn.LayerNorm(D), nn.LayerNorm(D), Attn()
        self.ff = nn.Sequential(nn.Linear(D, 4 * D), nn.GELU(), nn.Linear(4 * D, D))

    def forward(self, x, past=None):
        y, kept = self.at(self.n1(x), past)
        x = x + y
        return x + self.ff(self.n2(x)), kept


class LM(nn.Module):
    def __init__(self):
        super().__init__()
        self.tok, self.pos = nn.Embedding(V, D), nn.Embedding(T, D)
        self.blocks = nn.ModuleList([Block() for _ in range(L)])
        self.norm, self.head = nn.LayerNorm(D), nn.Linear(D, V, bias=False)

    def forward(self, idx, targets=None, cache=None):
        start = 0 if cache is None or a.wrong == "position" else cache[0][0].shape[2]
        x = self.tok(idx) + self.pos(torch.arange(start, start + idx.shape[1]))
        new = []
        for i, block in enumerate(self.blocks):
            layer = None if cache is None else cache[0 if a.wrong == "layer" else i]
            x, kept = block(x, layer)
            new.append(kept)
        logits = self.head(self.norm(x))
        if targets is not None:
            return logits, F.cross_entropy(logits.view(-1, V), targets.view(-1))
        return logits, new

    def second(self, idx):
        """Sampling has a forward of its own."""
        x = self.tok(idx) + self.pos(torch.arange(idx.shape[1]))
        for block in self.blocks:
            if a.wrong == "order":
                x = x + block.n1(block.at(x)[0])
                x = x + block.n2(block.ff(x))
            else:
                x, _ = block(x)
        return self.head(self.norm(x))


def choose(logits):
    if a.decode == "greedy":
        return logits.argmax(-1, keepdim=True)
    if a.decode == "topk":
        v, _ = torch.topk(logits, 5)
        logits = logits.masked_fill(logits < v[:, [-1]], -float("inf"))
    scale = {"sample": 1.0, "hot": 1 / 4.0, "cool": 1 / 0.8, "times": 0.3, "topk": 1.0}[a.decode]
    return torch.multinomial(F.softmax(logits * scale, -1), 1)


@torch.no_grad()
def generate(lm, n):
    was = lm.training
    lm.eval()
    idx = data[None, 5:13].clone()
    if a.loop == "cached":
        n = min(n, T - idx.shape[1])
        logits, cache = lm(idx)
        for _ in range(n):
            nxt = choose(logits[:, -1])
            idx = torch.cat([idx, nxt], 1)
            logits, cache = lm(nxt, cache=None if a.wrong == "nocache" else cache)
    elif a.loop == "buffer":
        buf = torch.zeros(2, T, dtype=torch.long)
        buf[:, :8] = idx
        for t in range(8, T):
            logits, _ = lm(buf)
            buf[:, t] = choose(logits[:, t - 1])[:, 0]
        idx = buf
    elif a.loop == "relist":
        ids = idx[0].tolist()
        while len(ids) < n:
            logits, _ = lm(torch.tensor([ids[-T:]]))
            ids.append(choose(logits[:, -1]).item())
        idx = torch.tensor([ids])
    else:
        for _ in range(n):
            cut = idx[:, -T:]
            logits = lm.second(cut) if a.loop == "by_parts" else lm(cut)[0]
            idx = torch.cat([idx, choose(logits[:, -1])], 1)
    lm.train(was)
    return "".join(chars[i] for i in idx[0].tolist())


lm = LM()
opt = torch.optim.AdamW(lm.parameters(), a.lr)
for step in range(a.steps):
    k = torch.randint(len(data) - T - 1, (16,))
    x, y = torch.stack([data[i : i + T] for i in k]), torch.stack([data[i + 1 : i + T + 1] for i in k])
    _, loss = lm(x, y)
    opt.zero_grad()
    loss.backward()
    nn.utils.clip_grad_norm_(lm.parameters(), 1.0)
    opt.step()
    for g in opt.param_groups:
        g["lr"] = a.lr * (1 - step / a.steps) + 1e-5
    if step % 60 == 0:
        print(step, round(loss.item(), 3))
        if a.during:
            print(generate(lm, 60)[:40])
print("end", round(loss.item(), 3))
made = LM() if a.wrong == "fresh" else lm
print(generate(made, a.n))
