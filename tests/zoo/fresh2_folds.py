"""Cross-validation of a feature-tokenising transformer on a table, then a small search over sizes: many models in one process."""

import itertools
import json
import sys

import numpy as np
import torch
from torch import nn
from torch.utils.data import DataLoader, Subset, TensorDataset

task = sys.argv[1] if len(sys.argv) > 1 else "folds"
wrong = sys.argv[2] if len(sys.argv) > 2 else ""
rng = np.random.default_rng(0)
torch.set_num_threads(1)
N, NUM, CAT = 900, 6, 3
numeric = rng.normal(size=(N, NUM)).astype("float32")
category = rng.integers(0, 5, size=(N, CAT))
score = numeric[:, 0] * 1.5 - numeric[:, 1] * numeric[:, 2] + (category[:, 0] == 2) * 1.2 + rng.normal(scale=0.4, size=N)
label = (score > np.median(score)).astype("int64")
if wrong == "sorted":
    order = np.argsort(label, kind="stable")
    numeric, category, label = numeric[order], category[order], label[order]
data = TensorDataset(torch.from_numpy(numeric), torch.from_numpy(category), torch.from_numpy(label))


class FTTransformer(nn.Module):
    def __init__(self, d=32, depth=2, drop=0.1):
        super().__init__()
        self.w, self.b = nn.Parameter(torch.randn(NUM, d) * d**-0.5), nn.Parameter(torch.zeros(NUM, d))
        self.cat = nn.Embedding(5 * CAT, d)
        self.register_buffer("offset", torch.arange(CAT) * 5)
        self.cls = nn.Parameter(torch.randn(d) * d**-0.5)
        layer = nn.TransformerEncoderLayer(d, 4, 2 * d, drop, batch_first=True, norm_first=True)
        self.enc = nn.TransformerEncoder(layer, depth, enable_nested_tensor=False)
        self.out = nn.Sequential(nn.LayerNorm(d), nn.ReLU(), nn.Linear(d, 2))

    def forward(self, x, c):
        tokens = torch.cat([self.cls.expand(len(x), 1, -1), x[..., None] * self.w + self.b, self.cat(c + self.offset)], 1)
        return self.out(self.enc(tokens)[:, 0])


def validate(net, loader):
    if wrong != "noeval":
        net.eval()
    right = total = 0
    with torch.no_grad():
        for x, c, y in loader:
            right += (net(x, c).argmax(-1) == y).sum().item()
            total += len(y)
    if wrong != "stays":
        net.train()
    return right / total


def fit(net, opt, train, valid, epochs):
    best, patience = 0.0, 0
    for _epoch in range(epochs):
        for x, c, y in train:
            opt.zero_grad()
            loss = nn.functional.cross_entropy(net(x, c), y)
            loss.backward()
            opt.step()
        acc = validate(net, valid)
        best, patience = max(best, acc), 0 if acc > best else patience + 1
        if patience > 2:
            break
    return best


def loaders(train_idx, valid_idx, size=32):
    return (
        DataLoader(Subset(data, train_idx), size, shuffle=wrong not in ("sorted", "fixed"), drop_last=True),
        DataLoader(Subset(data, valid_idx), 128),
    )


def folds(k=4):
    torch.manual_seed(0)
    perm = np.arange(N) if wrong == "sorted" else rng.permutation(N)
    opt = None
    for fold, held in enumerate(np.array_split(perm, k)):
        train, valid = loaders(np.setdiff1d(perm, held), held)
        net = FTTransformer()
        if opt is None or wrong != "oneopt":
            opt = torch.optim.AdamW(net.parameters(), lr=2e-3, weight_decay=1e-2)
        yield {"fold": fold, "accuracy": fit(net, opt, train, valid, 4)}


def search():
    perm = rng.permutation(N)
    train, valid = loaders(perm[:700], perm[700:])
    for d, lr, drop in itertools.product((16, 32), (1e-3, 3e-3), (0.0, 0.2)):
        torch.manual_seed(1)
        net = FTTransformer(d=d, drop=drop)
        opt = torch.optim.Adam(net.parameters(), lr=lr)
        yield {"d": d, "lr": lr, "drop": drop, "accuracy": fit(net, opt, train, valid, 2)}


def ensemble(members=3):
    """All members see every batch; one optimizer for all."""
    torch.manual_seed(4)
    perm = rng.permutation(N)
    train, valid = loaders(perm[:700], perm[700:])
    nets = [FTTransformer(d=24) for _ in range(members)]
    opt = torch.optim.AdamW(itertools.chain.from_iterable(n.parameters() for n in (nets[:-1] if wrong == "forgotten" else nets)), lr=2e-3)
    for epoch in range(4):
        for x, c, y in train:
            loss = sum(nn.functional.cross_entropy(n(x, c), y) for n in nets)
            opt.zero_grad()
            loss.backward()
            opt.step()
        yield {"epoch": epoch, "accuracy": float(np.mean([validate(n, valid) for n in nets]))}


for row in {"folds": folds, "search": search, "ensemble": ensemble}[task]():
    print(json.dumps(row))
