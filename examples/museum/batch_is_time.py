"""A stock transformer encoder takes the batch for the sequence, because `batch_first` was left at its default.

The encoder of a molecule generator is fed (batch, length, features), and `nn.TransformerEncoderLayer` expects (length, batch, features)
unless told otherwise: attention then runs over the molecules of a batch and not over the atoms of a molecule. The same was found in other
published models; training does learn something, and predictions depend on the company they are made in. Here strings of letters stand for molecules.
Repair: batch_first=True.

Thread: https://github.com/DaoyuanLi2816/Molecule-Generator/pull/22
Thread: https://github.com/IBM/TabFormer/pull/14
Condition: batch-mixing
"""

import sys
from pathlib import Path

import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

FIXED = "fixed" in sys.argv[1:]
LENGTH, DIM, EPOCHS = 12, 32, 3

text = (Path(__file__).resolve().parent.parent / "data" / "tinyshakespeare.txt").read_text()[:60_000]
characters = sorted(set(text))
windows = torch.tensor([characters.index(c) for c in text]).unfold(0, LENGTH, LENGTH * 3)
is_vowel = torch.tensor([c in "aeiouAEIOU" for c in characters])
vowels = is_vowel[windows].sum(1).float()


class Encoder(nn.Module):
    def __init__(self):
        super().__init__()
        self.embedding = nn.Embedding(len(characters), DIM)
        self.position = nn.Parameter(0.02 * torch.randn(LENGTH, DIM))
        layer = nn.TransformerEncoderLayer(DIM, nhead=4, dim_feedforward=64, dropout=0.0, batch_first=FIXED)
        self.encoder = nn.TransformerEncoder(layer, num_layers=2)
        self.score = nn.Linear(DIM, 1)

    def forward(self, x):
        h = self.encoder(self.embedding(x) + self.position)
        return self.score(h.mean(dim=1)).squeeze(-1)


torch.manual_seed(0)
loader = DataLoader(TensorDataset(windows, vowels), batch_size=32, shuffle=True, drop_last=True)
model = Encoder()
optimizer = torch.optim.Adam(model.parameters(), lr=1e-3)
criterion = nn.MSELoss()
for epoch in range(EPOCHS):
    total = 0.0
    for batch, target in loader:
        optimizer.zero_grad()
        loss = criterion(model(batch), target)
        loss.backward()
        optimizer.step()
        total += loss.item()
    print(f"epoch {epoch + 1}: mse {total / len(loader):.3f}")
