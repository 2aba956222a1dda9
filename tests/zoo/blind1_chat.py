"""Word-level language model with a key/value cache for decoding; writes text with it when it is trained."""
import argparse
import os
import re
from collections import Counter

import torch
import torch.nn as nn
import torch.nn.functional as F

ap = argparse.ArgumentParser()
ap.add_argument("--cache", default="right")  # right, position (position 0 for each new token), scale
ap.add_argument("--temperature", type=float, default=0.9)
ap.add_argument("--topk", type=int, default=40)
ap.add_argument("--steps", type=int, default=180)
ap.add_argument("--tokens", type=int, default=60)
ap.add_argument("--every", type=int, default=0)
args = ap.parse_args()
torch.manual_seed(42)
raw = open(os.path.join(os.path.dirname(os.path.abspath(__file__)), "..", "..", "examples", "data", "tinyshakespeare.txt")).read()[:150000]
words = re.findall(r"\w+|[^\w\s]|\n", raw.lower())
vocab = ["<unk>"] + [w for w, _ in Counter(words).most_common(399)]
index = {w: i for i, w in enumerate(vocab)}
data = torch.tensor([index.get(w, 0) for w in words])
CTX, D, H = 64, 64, 4


class Decoder(nn.Module):
    def __init__(self):
        super().__init__()
        self.norm1, self.norm2 = nn.RMSNorm(D), nn.RMSNorm(D)
        self.q, self.k, self.v, self.o = (nn.Linear(D, D, bias=False) for _ in range(4))
        self.gate, self.up, self.down = nn.Linear(D, 2 * D, bias=False), nn.Linear(D, 2 * D, bias=False), nn.Linear(2 * D, D, bias=False)

    def forward(self, x, past=None):
        b, t, _ = x.shape
        h = self.norm1(x)
        q, k, v = (f(h).view(b, t, H, D // H).transpose(1, 2) for f in (self.q, self.k, self.v))
        if past is not None:
            k, v = torch.cat([past[0], k], 2), torch.cat([past[1], v], 2)
        scale = (D**-0.5) if args.cache == "scale" and past is not None else None
        y = F.scaled_dot_product_attention(q, k, v, is_causal=past is None, scale=scale)
        x = x + self.o(y.transpose(1, 2).reshape(b, t, D))
        h = self.norm2(x)
        return x + self.down(F.silu(self.gate(h)) * self.up(h)), (k, v)


class LM(nn.Module):
    def __init__(self):
        super().__init__()
        self.embed, self.place = nn.Embedding(len(vocab), D), nn.Embedding(CTX, D)
        self.body, self.last = nn.ModuleList(Decoder() for _ in range(2)), nn.RMSNorm(D)
        self.apply(lambda m: nn.init.normal_(m.weight, std=0.02) if isinstance(m, (nn.Linear, nn.Embedding)) else None)

    def forward(self, ids, cache=None):
        start = 0 if cache is None or args.cache == "position" else cache[0][0].shape[2]
        x, new = self.embed(ids) + self.place(torch.arange(start, start + ids.shape[1])), []
        for i, layer in enumerate(self.body):
            x, kv = layer(x, None if cache is None else cache[i])
            new.append(kv)
        return self.last(x) @ self.embed.weight.T, new


lm = LM()
optimizer = torch.optim.AdamW(lm.parameters(), lr=3e-3, betas=(0.9, 0.95))


@torch.inference_mode()
def write(n):
    lm.eval()
    ids = [index["\n"]]
    logits, cache = lm(torch.tensor([ids]))
    while len(ids) < n:
        last = logits[0, -1]
        if args.temperature == 0:
            nxt = int(last.argmax())
        else:
            p = last / args.temperature
            if args.topk:
                p = p.masked_fill(p < p.topk(args.topk).values[-1], float("-inf"))
            nxt = int(torch.multinomial(p.softmax(-1), 1))
        ids.append(nxt)
        logits, cache = lm(torch.tensor([[nxt]]), cache)
    lm.train()
    return " ".join(vocab[i] for i in ids)


for step in range(args.steps):
    at = torch.randint(0, len(data) - CTX - 1, (16,))
    rows = torch.stack([data[i : i + CTX + 1] for i in at])
    logits, _ = lm(rows[:, :-1])
    loss = F.cross_entropy(logits.flatten(0, 1), rows[:, 1:].flatten())
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
    if step % 20 == 0:
        print(step, loss.item())
    if args.every and step % args.every == args.every - 1:
        print(write(args.tokens))
print(loss.item())
print(write(args.tokens))
