"""Two text towers trained with an in-batch contrastive loss: first half of a line against its second half; an EMA teacher is evaluated."""

import copy
import sys
from pathlib import Path

import torch
from torch import nn
from torch.nn.functional import cross_entropy, normalize

FAULT = sys.argv[1] if len(sys.argv) > 1 else None
torch.manual_seed(4)
torch.set_num_threads(1)
lines = [s for s in (Path(__file__).parents[2] / "examples/data/tinyshakespeare.txt").read_text().splitlines() if 30 < len(s) < 60][:2500]
known = {c: i + 1 for i, c in enumerate(sorted(set("".join(lines))))}
WIDTH = 30


def encode(s):
    ids = [known[c] for c in s[:WIDTH]]
    return ids + [0] * (WIDTH - len(ids))


first = torch.tensor([encode(s[: len(s) // 2]) for s in lines])
second = torch.tensor([encode(s[len(s) // 2 :]) for s in lines])


class Tower(nn.Module):
    def __init__(self, dim=48):
        super().__init__()
        self.emb = nn.Embedding(len(known) + 1, dim, padding_idx=0)
        layer = nn.TransformerEncoderLayer(dim, 4, 96, 0.0, batch_first=True, norm_first=True)
        self.enc = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)
        self.proj = nn.Sequential(nn.Linear(dim, dim), nn.BatchNorm1d(dim), nn.ReLU(), nn.Linear(dim, 24))

    def forward(self, ids):
        pad = ids == 0
        x = self.emb(ids)
        if FAULT == "mixed":
            x = self.enc(x.reshape(ids.shape[1], ids.shape[0], -1)).reshape(ids.shape[0], ids.shape[1], -1)
        else:
            x = self.enc(x, src_key_padding_mask=pad)
        x = x.masked_fill(pad[..., None], 0).sum(1) / (~pad).sum(1, keepdim=True)
        return normalize(self.proj(x), dim=-1)


class Pair(nn.Module):
    def __init__(self):
        super().__init__()
        self.left, self.right = Tower(), Tower()
        self.log_scale = nn.Parameter(torch.tensor(2.3))

    def forward(self, a, b):
        return self.log_scale.exp().clamp(max=100) * self.left(a) @ self.right(b).T


student = Pair()
teacher = copy.deepcopy(student).requires_grad_(False)
optim = torch.optim.AdamW(student.parameters(), lr=1e-3, weight_decay=0.05)
order = torch.randperm(2400)
for step in range(90):
    rows = order[(step * 32) % 2400 :][:32]
    sim = student(first[rows], second[rows])
    goal = torch.arange(len(rows))
    loss = (cross_entropy(sim, goal) + cross_entropy(sim.t(), goal)) / 2
    optim.zero_grad()
    loss.backward()
    optim.step()
    with torch.no_grad():
        for slow, fast in zip(teacher.parameters(), student.parameters()):
            slow.lerp_(fast, 0.05)
        for slow, fast in zip(teacher.buffers(), student.buffers()):
            slow.copy_(fast)
    if step % 30 == 29:
        teacher.eval()
        with torch.no_grad():
            held = teacher(first[2400:2464], second[2400:2464])
        print(step, round(loss.item(), 3), "recall@5", (held.topk(5).indices == torch.arange(64)[:, None]).any(1).float().mean().item())
