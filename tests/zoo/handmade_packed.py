"""Packed and padded instruction data for a small decoder."""
import sys
import torch
import torch.nn as nn
import torch.nn.functional as F

what = sys.argv[1] if len(sys.argv) > 1 else "packed"
torch.manual_seed(31)
torch.set_num_threads(1)
PAD, EOS, SEP, V, T = 0, 1, 2, 64, 40


def document():
    a, s, n = (int(torch.randint(lo, hi, (1,))) for lo, hi in ((3, V), (1, 9), (5, 14)))
    body = [(a + s * i) % (V - 3) + 3 for i in range(n)]
    return body[:3] + [SEP] + body[3:] + [EOS]


def packed_batch(n=12):
    rows, docs, pos = [], [], []
    for _ in range(n):
        r, d, p = [], [], []
        k = 0
        while len(r) <= T:
            w = document()
            r += w; d += [k] * len(w); p += range(len(w)); k += 1
        rows.append(r[: T + 1]); docs.append(d[: T + 1]); pos.append(p[: T + 1])
    r, d, p = map(torch.tensor, (rows, docs, pos))
    y = r[:, 1:].clone()
    y[d[:, 1:] != d[:, :-1]] = -100
    return r[:, :-1], y, d[:, :-1], p[:, :-1]


def padded_batch(n=12):
    ws = [document() for _ in range(n)]
    L = max(map(len, ws))
    fill = EOS if what.startswith("eospad") else PAD
    x = torch.full((n, L), fill)
    y = torch.full((n, L), -100)
    for i, w in enumerate(ws):
        x[i, : len(w)] = torch.tensor(w)
        y[i, : len(w)] = torch.tensor(w)
        y[i, :4] = -100
        if what == "padcounted":
            y[i, len(w):] = fill
    if what == "eospad_masked":
        y[x == fill] = -100
    return x[:, :-1], y[:, 1:], None, None


class Decoder(nn.Module):
    def __init__(self, d=48):
        super().__init__()
        self.tok, self.pos = nn.Embedding(V, d), nn.Embedding(T + 1, d)
        self.n1 = nn.ModuleList(nn.LayerNorm(d) for _ in range(2))
        self.n2 = nn.ModuleList(nn.LayerNorm(d) for _ in range(2))
        self.att = nn.ModuleList(nn.MultiheadAttention(d, 4, batch_first=True) for _ in range(2))
        self.mlp = nn.ModuleList(nn.Sequential(nn.Linear(d, 4 * d), nn.GELU(), nn.Linear(4 * d, d)) for _ in range(2))
        self.nf, self.out = nn.LayerNorm(d), nn.Linear(d, V)

    def forward(self, ids, doc_ids=None, position_ids=None):
        t = ids.shape[1]
        if position_ids is None:
            position_ids = torch.arange(t).expand_as(ids)
        hidden = ~torch.ones(t, t, dtype=torch.bool).tril()
        mask = hidden.expand(len(ids), t, t)
        if doc_ids is not None and what != "contaminated":
            mask = mask | (doc_ids[:, :, None] != doc_ids[:, None, :])
        mask = mask.repeat_interleave(4, 0)
        x = self.tok(ids) + self.pos(position_ids)
        for a, b, m, f in zip(self.n1, self.n2, self.att, self.mlp):
            h = a(x)
            x = x + m(h, h, h, attn_mask=mask, need_weights=False)[0]
            x = x + f(b(x))
        return self.out(self.nf(x))


net = Decoder()
opt = torch.optim.AdamW(net.parameters(), lr=2e-3)
for it in range(40):
    x, y, d, p = packed_batch() if what in ("packed", "contaminated") else padded_batch()
    logits = net(x, d, p)
    loss = F.cross_entropy(logits.reshape(-1, V), y.reshape(-1))
    opt.zero_grad()
    loss.backward()
    torch.nn.utils.clip_grad_norm_(net.parameters(), 1.0)
    opt.step()
    if it % 10 == 0:
        print(it, loss.item())
