"""A Perceiver that reads bytes: sixteen latents attend to a padded line and tell its kind; stochastic depth, smoothing, class weights."""

import pathlib
import sys
from collections import Counter

import torch
from torch import nn
from torch.nn import functional as F

bug = sys.argv[1] if len(sys.argv) > 1 else ""
torch.manual_seed(2)
torch.set_num_threads(1)
text = (pathlib.Path(__file__).parents[2] / "examples/data/tinyshakespeare.txt").read_text()
kinds = {"?": 0, "!": 1, ".": 2, ",": 3}
lines = [x for x in text.splitlines() if 12 < len(x) < 52 and x[-1] in kinds]
lines = [x for x in lines if kinds[x[-1]] < 2] + [x for x in lines if kinds[x[-1]] >= 2][:700]
ys = torch.tensor([kinds[x[-1]] for x in lines])
xs = [torch.tensor(list(x[:-1].encode())) for x in lines]
tally = Counter(ys.tolist())
weights = torch.tensor([len(ys) / (4 * tally[i]) for i in range(4)])


def pad(seq):
    return nn.utils.rnn.pad_sequence(seq, batch_first=True)


class DropPath(nn.Module):
    def __init__(self, rate):
        super().__init__()
        self.keep = 1 - rate

    def forward(self, x):
        if not self.training or self.keep == 1:
            return x
        coin = (torch.rand(x.shape[0], 1, 1) < self.keep).float()
        return x / self.keep * coin


class Look(nn.Module):
    """Queries of `a` over keys of `b`; `void` marks keys that are padding."""

    def __init__(self, d, h=4):
        super().__init__()
        self.h, self.d = h, d
        self.na, self.nb = nn.LayerNorm(d), nn.LayerNorm(d)
        self.q, self.kv, self.o = nn.Linear(d, d, bias=False), nn.Linear(d, 2 * d, bias=False), nn.Linear(d, d)

    def forward(self, a, b, void=None):
        q, (k, v) = self.q(self.na(a)), self.kv(self.nb(b)).chunk(2, -1)
        q, k, v = (t.view(t.shape[0], t.shape[1], self.h, self.d // self.h).transpose(1, 2) for t in (q, k, v))
        s = torch.einsum("bhid,bhjd->bhij", q, k) * (self.d // self.h) ** -0.5
        if void is not None:
            flag = ~void if bug == "inverted" else void
            s = s.masked_fill(flag[:, None, None, :], torch.finfo(s.dtype).min)
        if bug == "axis":
            w = s.softmax(0)
        else:
            w = s.softmax(-1)
        return self.o(torch.einsum("bhij,bhjd->bhid", w, v).transpose(1, 2).reshape(a.shape))


class Perceiver(nn.Module):
    def __init__(self, d=48, depth=3):
        super().__init__()
        self.byte, self.place = nn.Embedding(256, d), nn.Embedding(64, d)
        self.latents = nn.Parameter(torch.randn(16, d) * 0.1)
        self.read = Look(d)
        self.think = nn.ModuleList(Look(d) for _ in range(depth))
        self.mlps = nn.ModuleList(nn.Sequential(nn.LayerNorm(d), nn.Linear(d, 2 * d), nn.GELU(), nn.Linear(2 * d, d)) for _ in range(depth))
        rates = torch.linspace(0, 1 if bug == "alldropped" else 0.2, depth).tolist()
        self.paths = nn.ModuleList(DropPath(r) for r in rates)
        self.answer = nn.Sequential(nn.LayerNorm(d), nn.Linear(d, 4))

    def forward(self, ids, void):
        x = self.byte(ids) + self.place(torch.arange(ids.shape[1]))
        z = self.latents.expand(len(ids), -1, -1)
        z = z + self.read(z, x, None if bug == "nomask" else void)
        for look, mlp, path in zip(self.think, self.mlps, self.paths):
            z = z + path(look(z, z))
            z = z + path(mlp(z))
        return self.answer(z.mean(1))


net = Perceiver()
opt = torch.optim.AdamW(net.parameters(), 1.5e-3, weight_decay=0.02)
loss_fn = nn.CrossEntropyLoss(weight=weights, label_smoothing=0.1)
hold = 240
perm = torch.randperm(len(xs)).tolist()
test, train = perm[:hold], perm[hold:]
for epoch in range(2):
    order = torch.randperm(len(train)).tolist()
    for at in range(0, len(order) - 31, 32):
        rows = [train[i] for i in order[at : at + 32]]
        ids = pad([xs[i] for i in rows])
        out = net(ids, ids == 0)
        if bug == "probs":
            p = (out * 400).softmax(-1)
            onehot = F.one_hot(ys[rows], 4)
            loss = -(onehot * p.log()).sum(-1).mean()
        elif bug == "column":
            loss = F.mse_loss(out.softmax(-1)[:, :1], (ys[rows] == 0).float())
        else:
            loss = loss_fn(out, ys[rows])
        opt.zero_grad()
        loss.backward()
        opt.step()
    net.eval()
    with torch.no_grad():
        ids = pad([xs[i] for i in test])
        hit = (net(ids, ids == 0).argmax(-1) == ys[test]).float().mean()
    net.train()
    print(epoch, f"{loss.item():.3f} {hit:.3f}")
