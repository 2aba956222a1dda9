"""House-price-like regression with batch norm, ReLU and Monte-Carlo dropout; features are standardised once and kept."""

import argparse

import numpy as np
import torch
import torch.nn as nn
from torch.utils.data import DataLoader, TensorDataset

ap = argparse.ArgumentParser()
ap.add_argument("--variant", default="plain")
variant = ap.parse_args().variant
rng = np.random.default_rng(2)
torch.manual_seed(2)
torch.set_num_threads(1)
features = rng.normal(size=(1200, 12)) * rng.uniform(0.5, 30, size=12)
price = 3 * np.tanh(features[:, 0] / features[:, 0].std()) + features[:, 1] / features[:, 1].std() + 0.2 * rng.normal(size=1200)
X = torch.tensor((features - features.mean(0)) / features.std(0), dtype=torch.float32)
y = torch.tensor((price - price.mean()) / price.std(), dtype=torch.float32)
if variant != "broadcast":
    y = y[:, None]
train_dl = DataLoader(TensorDataset(X[:1000], y[:1000]), batch_size=50, shuffle=True)
val_dl = DataLoader(TensorDataset(X[1000:], y[1000:]), batch_size=100)


class MLP(nn.Module):
    def __init__(self):
        super().__init__()
        self.inp = nn.Linear(12, 64)
        self.bn = nn.BatchNorm1d(64)
        self.mid = nn.Linear(64, 64)
        self.drop = nn.Dropout(0.1)
        self.out = nn.Linear(64, 1)

    def forward(self, x):
        x = torch.relu(self.bn(self.inp(x)))
        x = self.drop(torch.relu(self.mid(x)))
        return self.out(x)


model = MLP()
if variant == "dead":
    with torch.no_grad():
        model.mid.bias.fill_(-4.0)
elif variant == "narrow":
    model.mid = nn.Linear(60, 64)
criterion = nn.MSELoss()
optimizer = torch.optim.Adam(model.parameters(), lr=2e-3)
scheduler = torch.optim.lr_scheduler.ReduceLROnPlateau(optimizer, patience=4)
train_log, val_log = [], []
for epoch in range(10):
    model.train()
    if variant == "evalmode":
        model.eval()
    running = 0.0
    for xb, yb in train_dl:
        optimizer.zero_grad()
        loss = criterion(model(xb), yb)
        loss.backward()
        optimizer.step()
        running += loss.item() * len(xb)
    train_log.append(running / 1000)
    if variant != "trainmode":
        model.eval()
    with torch.no_grad():
        val_log.append(sum(criterion(model(xb), yb).item() * len(xb) for xb, yb in val_dl) / 200)
    scheduler.step(val_log[-1])
    print(f"{epoch:2d} {train_log[-1]:.4f} {val_log[-1]:.4f}")
if variant in ("plain", "dead"):  # predictive spread: dropout on, batch norm off, twenty passes
    model.eval()
    model.drop.train()
    with torch.no_grad():
        draws = torch.stack([model(X[1000:1050]) for _ in range(20)])
    print("mean spread", draws.std(0).mean().item())
