"""Sequential recommendation (SASRec-like): histories padded on the left, causal self-attention, sampled negatives."""

import argparse
import random

import torch
from torch import nn
from torch.nn import functional as F
from torch.utils.data import DataLoader

FAULTS = ["none", "nokeymask", "fullmask", "items", "echo", "padbce", "softmax"]
ITEMS, LENGTH = 120, 20


def histories(count, seed):
    """Users walk through items of one taste: the next item is usually a fixed successor."""
    rng = random.Random(seed)
    successor = list(range(1, ITEMS + 1))
    random.Random(99).shuffle(successor)
    for _ in range(count):
        item, walk = rng.randint(1, ITEMS), []
        for _ in range(rng.randint(6, LENGTH + 6)):
            walk.append(item)
            item = successor[item - 1] if rng.random() < 0.8 else rng.randint(1, ITEMS)
        yield walk


class Rows(torch.utils.data.Dataset):
    def __init__(self, count, seed, fault):
        self.walks, self.fault = list(histories(count, seed)), fault

    def __len__(self):
        return len(self.walks)

    def __getitem__(self, i):
        walk = self.walks[i][-(LENGTH + 1) :]
        past, future = walk[:-1], walk[1:]
        if self.fault == "echo":
            future = past
        blank = [0] * (LENGTH - len(past))
        negative = [random.randint(1, ITEMS) for _ in past]
        return torch.tensor(blank + past), torch.tensor(blank + future), torch.tensor(blank + negative)


class Layer(nn.Module):
    def __init__(self, dim, heads, drop):
        super().__init__()
        self.heads = heads
        self.q, self.kv, self.o = nn.Linear(dim, dim), nn.Linear(dim, 2 * dim), nn.Linear(dim, dim)
        self.ff = nn.Sequential(nn.Linear(dim, dim), nn.ReLU(), nn.Dropout(drop), nn.Linear(dim, dim))
        self.n1, self.n2, self.drop = nn.LayerNorm(dim), nn.LayerNorm(dim), nn.Dropout(drop)

    def forward(self, x, blocked):
        b, t, d = x.shape
        h = self.n1(x)
        q = self.q(h).view(b, t, self.heads, -1)
        k, v = self.kv(h).view(b, t, 2, self.heads, -1).unbind(2)
        scores = torch.einsum("bqhd,bkhd->bhqk", q, k) * (d // self.heads) ** -0.5
        weights = scores.masked_fill(blocked, float("-inf")).softmax(-1)
        x = x + self.drop(self.o(torch.einsum("bhqk,bkhd->bqhd", weights, v).reshape(b, t, d)))
        return x + self.drop(self.ff(self.n2(x)))


class SASRec(nn.Module):
    def __init__(self, fault, dim=48):
        super().__init__()
        self.fault = fault
        self.item = nn.Embedding(ITEMS if fault == "items" else ITEMS + 1, dim, padding_idx=0)
        self.place = nn.Embedding(LENGTH, dim)
        self.layers = nn.ModuleList(Layer(dim, 2, 0.1) for _ in range(2))
        self.norm = nn.LayerNorm(dim)
        nn.init.normal_(self.item.weight, std=dim**-0.5)
        nn.init.normal_(self.place.weight, std=0.02)
        with torch.no_grad():
            self.item.weight[0] = 0

    def forward(self, past):
        t = past.shape[1]
        ahead = torch.ones(t, t, dtype=torch.bool).triu(1)
        pad = (past == 0)[:, None, None]
        x = self.item(past) * self.item.embedding_dim**0.5 + self.place(torch.arange(t))
        if self.fault == "nokeymask":
            blocked = ahead
        elif self.fault == "fullmask":
            blocked = ahead | pad
        else:
            blocked = (ahead | pad) & ~torch.eye(t, dtype=torch.bool)
        for layer in self.layers:
            x = layer(x, blocked)
        return self.norm(x)

    def score(self, state, items):
        return (state * self.item(items)).sum(-1)


def step_loss(model, past, future, negative, fault):
    state = model(past)
    if fault == "softmax":
        return F.cross_entropy((state @ model.item.weight.T).flatten(0, 1), future.flatten(), ignore_index=0)
    good, bad = model.score(state, future), model.score(state, negative)
    each = F.binary_cross_entropy_with_logits(good, torch.ones_like(good), reduction="none")
    each = each + F.binary_cross_entropy_with_logits(bad, torch.zeros_like(bad), reduction="none")
    if fault == "padbce":
        return each.mean()
    real = future != 0
    return (each * real).sum() / real.sum()


@torch.inference_mode()
def hit_rate(model, rows):
    model.eval()
    past, future, _ = (torch.stack(part) for part in zip(*(rows[i] for i in range(200))))
    best = (model(past)[:, -1] @ model.item.weight.T).topk(10).indices
    model.train()
    return (best == future[:, -1:]).any(1).float().mean().item()


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("--fault", default="none", choices=FAULTS)
    fault = parser.parse_args().fault
    torch.manual_seed(0)
    random.seed(0)
    torch.set_num_threads(1)
    train, test = Rows(2000, 1, fault), Rows(200, 2, fault)
    loader = DataLoader(train, 40, shuffle=True)
    model = SASRec(fault)
    optim = torch.optim.Adam(model.parameters(), lr=2e-3, betas=(0.9, 0.98))
    for epoch in range(2):
        for past, future, negative in loader:
            loss = step_loss(model, past, future, negative, fault)
            optim.zero_grad()
            loss.backward()
            optim.step()
        print(f"epoch {epoch} loss {loss.item():.3f} hit@10 {hit_rate(model, test):.3f}")
