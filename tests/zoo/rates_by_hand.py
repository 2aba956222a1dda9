"""A character model by one's own hands: the learning rate is written into the optimizer's groups every step."""

import argparse
import math

import torch
import torch.nn.functional as F
from torch import nn

ap = argparse.ArgumentParser()
ap.add_argument("--shape", default="cosine")
ap.add_argument("--lr", type=float, default=3e-3)
ap.add_argument("--iters", type=int, default=160)
ap.add_argument("--plan", type=int, default=0)
ap.add_argument("--warm", type=int, default=16)
ap.add_argument("--opt", default="adamw")
args = ap.parse_args()
plan = args.plan or args.iters
torch.manual_seed(3)

SYMBOLS, SPAN, WIDTH = 24, 20, 32
follow = torch.randperm(SYMBOLS)


def sample(n=24):
    rows = [torch.randint(0, SYMBOLS, (n,))]
    for _ in range(SPAN):
        jump = torch.rand(n) < 0.1
        rows.append(torch.where(jump, torch.randint(0, SYMBOLS, (n,)), follow[rows[-1]]))
    rows = torch.stack(rows, 1)
    return rows[:, :-1], rows[:, 1:]


class Mixer(nn.Module):
    def __init__(self):
        super().__init__()
        self.symbols = nn.Embedding(SYMBOLS, WIDTH)
        self.places = nn.Embedding(SPAN, WIDTH)
        self.before, self.after = nn.LayerNorm(WIDTH), nn.LayerNorm(WIDTH)
        self.qkv, self.out = nn.Linear(WIDTH, 3 * WIDTH), nn.Linear(WIDTH, WIDTH)
        self.up, self.down = nn.Linear(WIDTH, 4 * WIDTH), nn.Linear(4 * WIDTH, WIDTH)
        self.last, self.read = nn.LayerNorm(WIDTH), nn.Linear(WIDTH, SYMBOLS)
        for part in self.modules():
            if isinstance(part, (nn.Linear, nn.Embedding)):
                nn.init.normal_(part.weight, std=0.02)

    def forward(self, ids):
        x = self.symbols(ids) + self.places.weight[: ids.shape[1]]
        q, k, v = self.qkv(self.before(x)).chunk(3, -1)
        x = x + self.out(F.scaled_dot_product_attention(q[:, None], k[:, None], v[:, None], is_causal=True)[:, 0])
        x = x + self.down(F.gelu(self.up(self.after(x))))
        return self.read(self.last(x))


def rate(it):
    if args.shape == "constant":
        return args.lr
    if args.shape == "sweep":  # learning-rate range test, a factor each step
        return 1e-6 * (1e5 ** (it / args.iters))
    if args.shape == "sweepline":  # the same on a straight line
        return args.lr * 20 * (it + 1) / args.iters
    if args.shape == "noam":
        return args.lr * math.sqrt(args.warm) * min((it + 1) ** -0.5, (it + 1) * args.warm**-1.5)
    if args.shape == "decades":
        return args.lr * 0.1 ** (it // plan)
    if args.shape == "triangles":
        return args.lr * (0.05 + abs((it % plan) / plan * 2 - 1))
    if args.shape == "restarts":
        return args.lr * (0.02 + 0.49 * (1 + math.cos(math.pi * (it % plan) / plan)))
    if args.shape == "phases":  # trained, then trained again with its own warm-up
        first = 2 * args.iters // 3
        it, length = (it, first) if it < first else (it - first, args.iters - first)
        return args.lr * min(1.0, (it + 1) / 10) * max(0.0, 1 - it / length)
    if it < args.warm:
        return args.lr * (it + 1) / args.warm
    done = (it - args.warm) / max(plan - args.warm, 1)
    if args.shape == "wsd":
        return args.lr * min(1.0, (1 - done) / 0.2)
    if args.shape == "line":
        return args.lr * (1 - done)
    if args.shape == "cosine":
        done = min(done, 1.0)
    return args.lr * (0.1 if args.shape == "cosine" else 0.0) + args.lr * 0.45 * (1 + math.cos(math.pi * done))


net = Mixer()
if args.opt == "sgd":
    opt = torch.optim.SGD(net.parameters(), lr=args.lr, momentum=0.9)
else:
    opt = torch.optim.AdamW(net.parameters(), lr=args.lr, betas=(0.9, 0.95))
for it in range(args.iters):
    for group in opt.param_groups:
        group["lr"] = rate(it)
    ids, nxt = sample()
    loss = F.cross_entropy(net(ids).flatten(0, 1), nxt.flatten())
    opt.zero_grad(set_to_none=True)
    loss.backward()
    nn.utils.clip_grad_norm_(net.parameters(), 1.0)
    opt.step()
    if it % 40 == 0:
        print(it, round(loss.item(), 3), rate(it))
print("end", loss.item())
