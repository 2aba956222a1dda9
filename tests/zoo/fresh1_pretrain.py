"""Streaming pretraining: shards -> tokenizer -> packed blocks -> mixed precision loop, checkpoint in the middle and resume."""
import argparse, collections, io, itertools, re, tempfile, zlib
import torch
import torch.nn as nn
from torch.utils.data import DataLoader, IterableDataset, get_worker_info

P = argparse.ArgumentParser()
P.add_argument("--steps", type=int, default=130)
P.add_argument("--dtype", choices=["float32", "amp", "bfloat16", "float64"], default="float32")
P.add_argument("--lr", type=float, default=2e-3)
P.add_argument("--workers", type=int, default=0)
P.add_argument("--tokenize", choices=["once", "always"], default="once")
P.add_argument("--attention", choices=["fused", "loops", "copies"], default="fused")
P.add_argument("--resume", choices=["full", "no"], default="no")
P.add_argument("--log", choices=["rare", "all"], default="rare")
P.add_argument("--curriculum", action="store_true")
P.add_argument("--restarts", action="store_true")
P.add_argument("--width", type=int, default=64)
P.add_argument("--layers", type=int, default=2)
P.add_argument("--rows", type=int, default=16)
a = P.parse_args()
torch.manual_seed(99)


def shards():
    import pydoc_data.topics as topics

    keys = sorted(topics.topics)
    return [[topics.topics[k] for k in keys[i::4]] for i in range(4)]


SHARDS = shards()


class BPE:
    """Merges learnt on the first shard; encoding is greedy over merge ranks, as in the book."""

    def __init__(self, text, merges):
        words = collections.Counter(re.findall(r"\s?\w+|\s|[^\w\s]", text))
        seqs = {w: list(w) for w in words}
        self.ranks = {}
        for rank in range(merges):
            pairs = collections.Counter()
            for w, n in words.items():
                for pair in zip(seqs[w], seqs[w][1:]):
                    pairs[pair] += n
            best = pairs.most_common(1)[0][0]
            self.ranks[best] = rank
            seqs = {w: self.merge(s, best) for w, s in seqs.items()}
        chars = sorted(set("".join(itertools.chain(*SHARDS))))
        self.ids = {t: i for i, t in enumerate(["<eod>"] + chars + [x + y for x, y in self.ranks])}
        self.cache = {}

    @staticmethod
    def merge(s, pair):
        out, i = [], 0
        while i < len(s):
            if i + 1 < len(s) and (s[i], s[i + 1]) == pair:
                out.append(s[i] + s[i + 1]); i += 2
            else:
                out.append(s[i]); i += 1
        return out

    def word(self, w):
        s = list(w)
        while len(s) > 1:
            rank, pair = min((self.ranks.get(p, 1 << 30), p) for p in zip(s, s[1:]))
            if rank == 1 << 30:
                break
            s = self.merge(s, pair)
        return [self.ids[t] for t in s]

    def encode(self, text, remember):
        out = []
        for w in re.findall(r"\s?\w+|\s|[^\w\s]", text):
            if remember and w in self.cache:
                out += self.cache[w]
                continue
            ids = self.word(w)
            if remember:
                self.cache[w] = ids
            out += ids
        return out + [0]


bpe = BPE("".join(SHARDS[0])[:60000], 120)


class Packed(IterableDataset):
    def __init__(self, length, shards):
        self.length, self.shards = length, shards

    def __iter__(self):
        info = get_worker_info()
        mine = self.shards[info.id :: info.num_workers] if info else self.shards
        order = torch.Generator().manual_seed(info.id if info else 0)
        buffer = []
        while True:
            docs = list(itertools.chain(*mine))
            for j in torch.randperm(len(docs), generator=order).tolist():
                buffer += bpe.encode(docs[j], a.tokenize == "once")
                while len(buffer) > self.length:
                    yield torch.tensor(buffer[: self.length + 1])
                    buffer = buffer[self.length :]


class Heads(nn.Module):
    def __init__(self, d, n):
        super().__init__()
        self.n, self.d = n, d // n
        self.q, self.k, self.v, self.o = nn.Linear(d, d), nn.Linear(d, d), nn.Linear(d, d), nn.Linear(d, d)

    def forward(self, x):
        b, t, c = x.shape
        q, k, v = self.q(x), self.k(x), self.v(x)
        if a.attention == "loops":
            mask = torch.ones(t, t, dtype=torch.bool).tril()
            rows = []
            for i in range(b):
                heads = []
                for h in range(self.n):
                    s = slice(h * self.d, (h + 1) * self.d)
                    scores = (q[i, :, s] @ k[i, :, s].T / self.d**0.5).masked_fill(~mask, float("-inf"))
                    heads.append(scores.softmax(-1) @ v[i, :, s])
                rows.append(torch.cat(heads, -1))
            return self.o(torch.stack(rows))
        if a.attention == "copies":
            q, k, v = q.clone(), k.clone(), v.clone()
            q, k, v = (z.to(torch.float64).to(torch.float32).contiguous().clone() for z in (q, k, v))
        q, k, v = (z.view(b, t, self.n, self.d).transpose(1, 2) for z in (q, k, v))
        if a.attention == "copies":
            q, k, v = (z.contiguous().cpu().clone().to(z.device) for z in (q, k, v))
        return self.o(nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2).reshape(b, t, c))


class Net(nn.Module):
    def __init__(self, vocab, d, layers, ctx):
        super().__init__()
        self.e, self.p = nn.Embedding(vocab, d), nn.Embedding(ctx, d)
        self.layers = nn.ModuleList()
        for _ in range(layers):
            self.layers.append(nn.ModuleDict({"n1": nn.LayerNorm(d), "at": Heads(d, 4), "n2": nn.LayerNorm(d), "ff": nn.Sequential(nn.Linear(d, 4 * d), nn.GELU(), nn.Linear(4 * d, d))}))
        self.n, self.h = nn.LayerNorm(d), nn.Linear(d, vocab, bias=False)
        nn.init.normal_(self.e.weight, std=0.02), nn.init.normal_(self.p.weight, std=0.02)

    def forward(self, ids):
        x = self.e(ids) + self.p.weight[: ids.shape[1]]
        for l in self.layers:
            x = x + l["at"](l["n1"](x))
            if a.attention == "copies":
                x = x.clone().detach_().requires_grad_() if False else x.clone()
            x = x + l["ff"](l["n2"](x))
        return self.h(self.n(x))


net = Net(len(bpe.ids), a.width, a.layers, 64)
if a.dtype in ("bfloat16", "float64"):
    net = net.to(getattr(torch, a.dtype))
opt = torch.optim.AdamW(net.parameters(), lr=a.lr, betas=(0.9, 0.95))


def schedule(opt):
    if a.restarts:
        return torch.optim.lr_scheduler.CosineAnnealingWarmRestarts(opt, T_0=45, eta_min=a.lr / 20)
    return torch.optim.lr_scheduler.SequentialLR(opt, [torch.optim.lr_scheduler.LinearLR(opt, 0.1, 1.0, 15), torch.optim.lr_scheduler.CosineAnnealingLR(opt, a.steps - 15, a.lr / 10)], [15])


sched = schedule(opt)
held = [d for d in SHARDS[3]][:2]
stream = iter(DataLoader(Packed(48, SHARDS[:3]), batch_size=a.rows, num_workers=a.workers))
check = next(iter(DataLoader(Packed(48, [held]), batch_size=32)))


def nll(ids):
    with torch.autocast("cpu", torch.bfloat16, enabled=a.dtype == "amp"):
        out = net(ids[:, :-1])
    if a.dtype == "float64":
        return nn.functional.cross_entropy(out.flatten(0, 1), ids[:, 1:].flatten())
    return nn.functional.cross_entropy(out.float().flatten(0, 1), ids[:, 1:].flatten())


step, smooth = 0, None
while step < a.steps:
    if a.resume == "full" and step == a.steps // 2:
        file = io.BytesIO()
        torch.save({"net": net.state_dict(), "opt": opt.state_dict(), "sched": sched.state_dict(), "step": step}, file)
        file.seek(0)
        state = torch.load(file)
        net = Net(len(bpe.ids), a.width, a.layers, 64)
        net.load_state_dict(state["net"])
        opt = torch.optim.AdamW(net.parameters(), lr=a.lr, betas=(0.9, 0.95))
        opt.load_state_dict(state["opt"])
        sched = schedule(opt)
        sched.load_state_dict(state["sched"])
    ids = next(stream)
    if a.curriculum:
        ids = ids[:, : 9 + 8 * min(5, step // 25)]
    loss = nll(ids)
    opt.zero_grad()
    loss.backward()
    norm = nn.utils.clip_grad_norm_(net.parameters(), 1.0)
    opt.step()
    sched.step()
    step += 1
    if a.log == "all":
        stats = {k: (float(p.norm()), float(p.grad.norm()), p.detach().cpu().numpy().copy().std()) for k, p in net.named_parameters()}
    smooth = loss.item() if smooth is None else 0.95 * smooth + 0.05 * loss.item()
    if step % 45 == 0:
        net.eval()
        with torch.no_grad():
            print(f"{step} loss {smooth:.3f} held-out {nll(check).item():.3f} norm {float(norm):.2f} lr {sched.get_last_lr()[0]:.1e}")
        net.train()
