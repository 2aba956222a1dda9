"""Runs into the limit it sets itself; --how picks where. `fits` is the same program within it."""
import argparse
import resource

import torch
import torch.nn as nn

how = argparse.ArgumentParser()
how.add_argument("--how", default="fits")
how = how.parse_args().how
torch.manual_seed(0)
GIB = 1 << 30
resource.setrlimit(resource.RLIMIT_DATA, (4 * GIB, 4 * GIB))


class Scorer(nn.Module):
    def __init__(self, classes=5000, width=96):
        super().__init__()
        self.table = nn.Embedding(classes, width)
        layer = nn.TransformerEncoderLayer(width, 4, 2 * width, dropout=0.0, batch_first=True, norm_first=True)
        self.body = nn.TransformerEncoder(layer, 3, enable_nested_tensor=False)
        self.out = nn.Linear(width, classes)

    def forward(self, ids):
        mask = nn.Transformer.generate_square_subsequent_mask(ids.shape[1])
        return self.out(self.body(self.table(ids), mask=mask, is_causal=True))


def batches(rows):
    while True:
        first = torch.randint(5000, (rows, 1))
        ids = (first + torch.arange(65) * 7) % 5000
        yield ids[:, :-1], ids[:, 1:]


if how == "list":
    table = [0.0] * 10
    while True:
        table = table + table  # MemoryError from plain Python
model = Scorer()
optimizer = torch.optim.AdamW(model.parameters(), lr=5e-4)
stream = batches(6000 if how == "forward" else 16)
for step in range(12):
    x, y = next(stream)
    loss = nn.functional.cross_entropy(model(x).transpose(1, 2), y)
    optimizer.zero_grad()
    loss.backward()
    nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    optimizer.step()
    if how == "late" and step == 6:
        stream = batches(9000)
    print(step, loss.item())
