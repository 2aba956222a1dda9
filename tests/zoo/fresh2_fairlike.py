"""Translation of made-up alphabets, batches by length with a token budget, summed loss, gradients divided by the tokens counted."""

import argparse
import logging
import random

import torch
from torch import nn

logging.basicConfig(level=logging.INFO, format="%(name)s | %(message)s")
log = logging.getLogger("train")
PAD, BOS, EOS, FIRST = 0, 1, 2, 3


def get_parser():
    p = argparse.ArgumentParser()
    p.add_argument("--max-tokens", type=int, default=400)
    p.add_argument("--update-freq", type=int, default=2)
    p.add_argument("--label-smoothing", type=float, default=0.1)
    p.add_argument("--max-update", type=int, default=60)
    p.add_argument("--defect", default="")
    return p


def corpus(n, seed):
    r = random.Random(seed)
    table = list(range(FIRST, FIRST + 24))
    random.Random(9).shuffle(table)
    for _ in range(n):
        src = [r.randrange(FIRST, FIRST + 24) for _ in range(r.randint(4, 18))]
        yield [*src, EOS], [table[t - FIRST] for t in reversed(src)] + [EOS]


def batches(pairs, budget, rng):
    """Pairs sorted by length, cut where the padded tokens reach the budget, in random order."""
    pairs = sorted(pairs, key=lambda p: (len(p[0]), rng.random()))
    out, now = [], []
    for pair in pairs:
        if now and (len(now) + 1) * len(pair[0]) > budget:
            out.append(now)
            now = []
        now.append(pair)
    out.append(now)
    rng.shuffle(out)
    return out


def merge(rows, left=False):
    width = max(map(len, rows))
    return torch.tensor([[PAD] * (width - len(r)) + r if left else r + [PAD] * (width - len(r)) for r in rows])


class Model(nn.Module):
    def __init__(self, args, d=64):
        super().__init__()
        self.args = args
        self.embed = nn.Embedding(FIRST + 24, d, padding_idx=PAD)
        self.places = nn.Embedding(40, d)
        self.core = nn.Transformer(d, 4, 2, 2, 128, 0.1, batch_first=True, norm_first=True)
        self.scale = d**0.5
        nn.init.normal_(self.embed.weight, std=d**-0.5)
        with torch.no_grad():
            self.embed.weight[PAD] = 0

    def see(self, ids):
        real = (ids != PAD).long()
        return self.embed(ids) * self.scale + self.places(real.cumsum(1) * real)

    def forward(self, src, prev):
        pad = src == PAD
        ahead = torch.ones(prev.shape[1], prev.shape[1], dtype=torch.bool).triu(1)
        x = self.core(
            self.see(src),
            self.see(prev),
            tgt_mask=ahead,
            src_key_padding_mask=pad,
            memory_key_padding_mask=None if self.args.defect == "memorypad" else pad,
        )
        return x @ self.embed.weight.T


def smoothed(logits, goal, eps):
    """Summed smoothed negative log-likelihood, and how many tokens it is over."""
    lp = logits.log_softmax(-1).flatten(0, 1)
    goal = goal.flatten()
    nll = -lp.gather(1, goal[:, None])[:, 0]
    flat = -lp.mean(-1)
    real = goal != PAD
    nll, flat = nll[real], flat[real]
    return ((1 - eps) * nll + eps * flat).sum(), len(nll)


def main(args):
    torch.manual_seed(1)
    torch.set_num_threads(1)
    rng = random.Random(2)
    pairs = list(corpus(1500, 3))
    model = Model(args)
    opt = torch.optim.Adam(model.parameters(), lr=1e-7, betas=(0.9, 0.98), eps=1e-9)
    update, queue = 0, []
    while update < args.max_update:
        if len(queue) < args.update_freq:
            queue = batches(pairs, args.max_tokens, rng)
        update += 1
        for g in opt.param_groups:
            g["lr"] = 2e-3 * min(update / 20, (20 / update) ** 0.5)
        opt.zero_grad()
        tokens = total = 0.0
        for _ in range(args.update_freq):
            rows = queue.pop()
            src, out = merge([s for s, _ in rows], left=True), merge([t for _, t in rows])
            prev = torch.cat([torch.full((len(out), 1), BOS), out[:, :-1]], 1)
            if args.defect == "given":
                prev = out
            loss, n = smoothed(model(src, prev), out, args.label_smoothing)
            loss.backward()
            tokens, total = tokens + n, total + loss.item()
        for p in model.parameters():
            if p.grad is not None:
                p.grad.div_(tokens)
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        opt.step()
        if update % 15 == 0:
            log.info("update %d loss %.3f tokens %d lr %.2e", update, total / tokens, tokens, opt.param_groups[0]["lr"])


if __name__ == "__main__":
    main(get_parser().parse_args())
