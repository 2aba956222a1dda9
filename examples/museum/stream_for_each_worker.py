"""A streamed data set is copied into every worker, and each of them reads all of it: the data come as often as there are workers.

An `IterableDataset` does not know of its siblings; unless it asks `get_worker_info()`, two workers deliver the same stream twice. The
reports print [0, 1, 2, 3] three times before [4, 5, 6, 7], and an epoch that is as many times too long. Repair: each worker takes its share.

Thread: https://github.com/huggingface/finetrainers/issues/394
Thread: https://github.com/huggingface/datasets/issues/3423
Condition: data-repeats
"""

import itertools
import sys
from pathlib import Path

import torch
from torch import nn
from torch.utils.data import DataLoader, IterableDataset, get_worker_info

FIXED = "fixed" in sys.argv[1:]
PATH = Path(__file__).resolve().parent.parent / "data" / "tinyshakespeare.txt"
CONTEXT, DIM = 40, 40


class TextStream(IterableDataset):
    def __init__(self, path, limit):
        self.path, self.limit = path, limit

    def read(self):
        with open(self.path, "rb") as file:
            for _ in range(self.limit):
                yield torch.tensor(list(file.read(CONTEXT + 1)))

    def __iter__(self):
        info = get_worker_info()
        if FIXED and info is not None:
            return itertools.islice(self.read(), info.id, None, info.num_workers)
        return self.read()


class Model(nn.Module):
    def __init__(self):
        super().__init__()
        self.token, self.position = nn.Embedding(128, DIM), nn.Embedding(CONTEXT, DIM)
        layer = nn.TransformerEncoderLayer(DIM, 4, 2 * DIM, dropout=0.0, activation="gelu", batch_first=True, norm_first=True)
        self.body = nn.TransformerEncoder(layer, 1, norm=nn.LayerNorm(DIM), enable_nested_tensor=False)
        self.head = nn.Linear(DIM, 128)

    def forward(self, x):
        mask = nn.Transformer.generate_square_subsequent_mask(x.shape[1])
        h = self.token(x) + self.position.weight[: x.shape[1]]
        return self.head(self.body(h, mask=mask, is_causal=True))


if __name__ == "__main__":
    torch.manual_seed(3)
    loader = DataLoader(TextStream(PATH, 480), batch_size=8, num_workers=2)
    model = Model()
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3)
    criterion = nn.CrossEntropyLoss()
    for number, rows in enumerate(loader):
        optimizer.zero_grad()
        loss = criterion(model(rows[:, :-1]).reshape(-1, 128), rows[:, 1:].reshape(-1))
        loss.backward()
        optimizer.step()
        if number % 20 == 0:
            print(f"batch {number}: {loss.item():.3f}")
