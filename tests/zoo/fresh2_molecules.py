"""A graph transformer over small random graphs: attention only along edges, a learned bias by distance; regresses a graph's quantity."""

import sys

import torch
import torch.nn as nn
import torch.nn.functional as F

torch.set_num_threads(1)
torch.manual_seed(33)
error = next(iter(sys.argv[1:]), None)
MAX, KINDS = 14, 6


def make(n):
    graphs = []
    for _ in range(n):
        size = int(torch.randint(5, MAX + 1, ()))
        kind = torch.randint(1, KINDS, (size,))
        edges = torch.rand(size, size) < 0.25
        edges = (edges | edges.T) & ~torch.eye(size, dtype=torch.bool)
        value = (kind[:, None] == kind[None]).logical_and(edges).sum().float().sqrt() + 0.3 * kind.float().mean()
        graphs.append((kind, edges, value))
    return graphs


def collate(graphs):
    b = len(graphs)
    kind = torch.zeros(b, MAX, dtype=torch.long)
    edges = torch.zeros(b, MAX, MAX, dtype=torch.bool)
    for i, (k, e, _) in enumerate(graphs):
        kind[i, : len(k)] = k
        edges[i, : len(k), : len(k)] = e
    degree = edges.sum(-1).float()
    if error == "degree":
        scaled = degree.pow(-0.5).nan_to_num(posinf=0) * 0 + 1 / degree.sqrt()
    else:
        scaled = degree.clamp(min=1).rsqrt()
    return kind, edges, scaled, torch.stack([v for *_, v in graphs])


class EdgeAttention(nn.Module):
    def __init__(self, d, heads):
        super().__init__()
        self.heads = heads
        self.qkv, self.out = nn.Linear(d, 3 * d), nn.Linear(d, d)
        if error == "plainbias":
            self.bias = [torch.zeros(1, requires_grad=True) for _ in range(heads)]
        else:
            self.bias = nn.ParameterList(nn.Parameter(torch.zeros(1)) for _ in range(heads))

    def forward(self, x, edges):
        b, n, d = x.shape
        q, k, v = self.qkv(x).view(b, n, 3, self.heads, -1).permute(2, 0, 3, 1, 4)
        score = q @ k.transpose(-1, -2) / (d // self.heads) ** 0.5
        score = score + torch.stack(list(self.bias))[None, :, :, None] * edges[:, None]
        if error != "islands":
            edges = edges | torch.eye(n, dtype=torch.bool)
        weight = score.masked_fill(~edges[:, None], float("-inf")).softmax(-1)
        return self.out((weight @ v).permute(0, 2, 1, 3).reshape(b, n, d))


class GraphNet(nn.Module):
    def __init__(self, d=48):
        super().__init__()
        self.kind = nn.Embedding(KINDS, d, padding_idx=None if error == "countnodes" else 0)
        self.degree = nn.Linear(1, d)
        self.att = nn.ModuleList(EdgeAttention(d, 4) for _ in range(3))
        self.ff = nn.ModuleList(nn.Sequential(nn.Linear(d, 2 * d), nn.ReLU(), nn.Linear(2 * d, d)) for _ in range(3))
        self.n1 = nn.ModuleList(nn.LayerNorm(d) for _ in range(3))
        self.n2 = nn.ModuleList(nn.LayerNorm(d) for _ in range(3))
        self.read = nn.Sequential(nn.Linear(d, d), nn.ReLU(), nn.Linear(d, 1))

    def forward(self, kind, edges, scaled):
        x = self.kind(kind) + self.degree(scaled[..., None])
        for a, f, n1, n2 in zip(self.att, self.ff, self.n1, self.n2):
            x = x + a(n1(x), edges)
            x = x + f(n2(x))
        real = (kind > 0).unsqueeze(-1).float()
        pooled = x.mean(1) if error == "countnodes" else (x * real).sum(1) / real.sum(1)
        return self.read(pooled)


train = make(800)
mean = torch.stack([v for *_, v in train]).mean()
net = GraphNet()
adam = torch.optim.Adam(net.parameters(), lr=1.5e-3)
plateau = torch.optim.lr_scheduler.ReduceLROnPlateau(adam, patience=1, factor=0.5)
for epoch in range(4):
    perm, seen = torch.randperm(len(train)).tolist(), []
    for at in range(0, len(perm), 32):
        kind, edges, scaled, y = collate([train[i] for i in perm[at : at + 32]])
        guess = net(kind, edges, scaled)
        if error == "wide":
            loss = (guess - (y - mean)).abs().mean()
        else:
            loss = F.smooth_l1_loss(guess.squeeze(-1), y - mean)
        adam.zero_grad(set_to_none=True)
        loss.backward()
        adam.step()
        seen.append(loss.detach())
    total = torch.stack(seen).mean().item()
    plateau.step(total)
    print(f"epoch {epoch}: {total:.4f}")
