"""Every worker of the loader is seeded with the same number: each batch comes once per worker.

A helper that should make runs repeatable was given as `worker_init_fn` and set one and the same seed in every worker. With random crops
all workers then cut the same ones; the report prints a batch four times over with four workers, and again in each epoch. (Forked workers
that inherit NumPy's state did the same by default in older versions of PyTorch.) Repair: add the worker's id to the seed.

Thread: https://github.com/bubbliiiing/yolox-pytorch/issues/154
Thread: https://github.com/pytorch/pytorch/issues/5059
Condition: data-repeats
"""

import random
import sys
from pathlib import Path

import numpy as np
import torch
from torch import nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, Dataset

FIXED = "fixed" in sys.argv[1:]
DIM, CONTEXT, BATCH, SEED = 64, 64, 8, 11

text = (Path(__file__).resolve().parent.parent / "data" / "tinyshakespeare.txt").read_text()[:200_000]
characters = sorted(set(text))
data = np.array([characters.index(c) for c in text])


class RandomCrops(Dataset):
    def __len__(self):
        return 400

    def __getitem__(self, index):
        start = np.random.randint(0, len(data) - CONTEXT - 1)
        return torch.from_numpy(data[start : start + CONTEXT + 1])


def seed_everything(seed):
    random.seed(seed)
    np.random.seed(seed)
    torch.manual_seed(seed)


def worker_init_fn(worker_id):
    seed_everything(SEED + worker_id if FIXED else SEED)


class CharRNN(nn.Module):
    def __init__(self):
        super().__init__()
        self.embedding = nn.Embedding(len(characters), DIM)
        self.rnn = nn.GRU(DIM, 2 * DIM, batch_first=True)
        self.head = nn.Linear(2 * DIM, len(characters))

    def forward(self, x):
        return self.head(self.rnn(self.embedding(x))[0])


def main():
    seed_everything(SEED)
    loader = DataLoader(RandomCrops(), batch_size=BATCH, num_workers=2, worker_init_fn=worker_init_fn)
    model = CharRNN()
    optimizer = torch.optim.Adam(model.parameters(), lr=3e-3)
    for batch in loader:
        loss = F.cross_entropy(model(batch[:, :-1]).flatten(0, 1), batch[:, 1:].flatten())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    print(f"loss {loss.item():.3f}")


if __name__ == "__main__":
    main()
