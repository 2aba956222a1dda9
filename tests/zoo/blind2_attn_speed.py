"""minGPT-like trainer class on word ids with a hand-written attention; the evaluation keeps its logits of a small set on purpose."""

import sys
from pathlib import Path

import torch
import torch.nn as nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, Dataset

style = sys.argv[1] if len(sys.argv) > 1 else "usual"
torch.manual_seed(14)
torch.set_num_threads(1)
if style == "double":
    torch.set_default_dtype(torch.float64)


class WordDataset(Dataset):
    def __init__(self, size=64):
        words = (Path(__file__).parents[2] / "examples/data/tinyshakespeare.txt").read_text()[:250_000].split()
        common = {}
        for w in words:
            common[w] = common.get(w, 0) + 1
        self.vocab = ["<unk>", *sorted(common, key=common.get, reverse=True)[:499]]
        index = {w: i for i, w in enumerate(self.vocab)}
        self.ids = torch.tensor([index.get(w, 0) for w in words])
        self.size = size

    def __len__(self):
        return len(self.ids) - self.size - 1

    def __getitem__(self, i):
        return self.ids[i : i + self.size], self.ids[i + 1 : i + self.size + 1]


class Attention(nn.Module):
    def __init__(self, d, h):
        super().__init__()
        self.query, self.key, self.value, self.proj = (nn.Linear(d, d) for _ in range(4))
        self.h = h

    def forward(self, x):
        if style == "copies":
            x = x.double().float().clone()
            for _ in range(12):
                x = x.clone().contiguous() + torch.zeros_like(x)
                assert torch.isfinite(x).all()
        b, t, d = x.shape
        q, k, v = (f(x).view(b, t, self.h, d // self.h).transpose(1, 2) for f in (self.query, self.key, self.value))
        if style == "positions":
            rows = []
            for i in range(t):
                s = torch.stack([(q[:, :, i] * k[:, :, j]).sum(-1) for j in range(i + 1)], -1) / (d // self.h) ** 0.5
                rows.append((s.softmax(-1).unsqueeze(-1) * v[:, :, : i + 1]).sum(2))
            y = torch.stack(rows, 2)
        else:
            s = q @ k.transpose(-1, -2) / (d // self.h) ** 0.5
            s = s.masked_fill(torch.ones(t, t, dtype=torch.bool).triu(1), float("-inf"))
            y = s.softmax(-1) @ v
        return self.proj(y.transpose(1, 2).reshape(b, t, d))


class WordGPT(nn.Module):
    def __init__(self, vocab, d=64, t=64):
        super().__init__()
        self.tok, self.pos = nn.Embedding(vocab, d), nn.Embedding(t, d)
        self.attn = nn.ModuleList([Attention(d, 4) for _ in range(2)])
        self.mlp = nn.ModuleList([nn.Sequential(nn.LayerNorm(d), nn.Linear(d, 4 * d), nn.GELU(), nn.Linear(4 * d, d)) for _ in range(2)])
        self.ln = nn.ModuleList([nn.LayerNorm(d) for _ in range(3)])
        self.head = nn.Linear(d, vocab, bias=False)

    def forward(self, x):
        x = self.tok(x) + self.pos.weight[: x.shape[1]]
        for ln, attn, mlp in zip(self.ln, self.attn, self.mlp):
            x = x + attn(ln(x))
            x = x + mlp(x)
        return self.head(self.ln[-1](x))


class Trainer:
    def __init__(self, model, data):
        self.model, self.data = model, data
        self.opt = torch.optim.AdamW(model.parameters(), lr=1e-3)
        self.kept = []

    def loss(self, x, y):
        if style == "each":
            parts = [F.cross_entropy(self.model(a[None])[0], b) for a, b in zip(x, y)]
            return torch.stack(parts).mean()
        return F.cross_entropy(self.model(x).flatten(0, 1), y.flatten())

    def evaluate(self):
        self.model.eval()
        found = []
        with torch.set_grad_enabled(style == "evalgraph"):
            for x, _y in DataLoader(torch.utils.data.Subset(self.data, range(0, 2400, 150)), 8):
                found.append(self.model(x))
        self.model.train()
        if style == "evalgraph":
            self.kept.append(found)
        return torch.cat(found).softmax(-1).max(-1).values.mean().item()

    def run(self, steps):
        loader = DataLoader(self.data, batch_size=16, shuffle=True)
        for i, (x, y) in zip(range(steps), loader):
            loss = self.loss(x, y)
            self.model.zero_grad(set_to_none=True)
            loss.backward()
            nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
            self.opt.step()
            if i % 20 == 19:
                print(i, loss.item(), self.evaluate())


words = WordDataset()
Trainer(WordGPT(len(words.vocab)), words).run(40 if style == "positions" else 80)
