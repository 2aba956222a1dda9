#!/usr/bin/env python
# coding: utf-8

# # Hourly load forecasting with a small transformer

# In[1]:


import os
import math
import time
import numpy as np
import torch
import torch.nn as nn
from torch.utils.data import Dataset, DataLoader

MODE = os.environ.get("MODE") or (__import__("sys").argv[1] if len(__import__("sys").argv) > 1 else "ok")
torch.manual_seed(0); np.random.seed(0)


# In[2]:


hours = np.arange(24 * 100)
load = (
    41000
    + 6200 * np.sin(2 * np.pi * hours / 24)
    + 2500 * np.sin(2 * np.pi * hours / (24 * 7) + 0.4)
    + 1800 * np.cumsum(np.random.normal(0, 0.05, len(hours)))
    + np.random.normal(0, 700, len(hours))
)
temperature = 12 + 9 * np.sin(2 * np.pi * hours / (24 * 60)) + 4 * np.sin(2 * np.pi * (hours - 4) / 24) + np.random.normal(0, 1, len(hours))
series = np.stack([load, temperature], 1).astype("float32")
split = int(len(series) * 0.85)
mu, sd = series[:split].mean(0), series[:split].std(0)
print(mu, sd)

if MODE not in ("raw", "rawtarget"):
    series = (series - mu) / sd
if MODE == "rawtarget":
    series[:, 1] = (series[:, 1] - mu[1]) / sd[1]


# In[3]:


HIST, AHEAD = 24, 6


class Windows(Dataset):
    def __init__(self, values):
        self.values = values

    def __len__(self):
        return len(self.values) - HIST - AHEAD

    def __getitem__(self, i):
        past = self.values[i : i + HIST]
        if MODE == "slowitems":
            # smooth every window with a gaussian kernel first
            past = np.array([[sum(past[max(0, t - k)][c] * math.exp(-k * k / 8) for k in range(12)) / sum(math.exp(-k * k / 8) for k in range(12)) for c in range(2)] for t in range(HIST)], dtype="float32")
        return torch.from_numpy(past), torch.from_numpy(self.values[i + HIST : i + HIST + AHEAD, 0])


few = 96 if MODE == "few" else split
train = Windows(series[:few + HIST + AHEAD] if MODE == "few" else series[:split])
test = Windows(series[split:])
train_dl = DataLoader(train, batch_size=16 if MODE == "few" else 32, shuffle=True)
test_dl = DataLoader(test, batch_size=64)


# In[4]:


class Forecaster(nn.Module):
    def __init__(self, d=48, layers=2):
        super().__init__()
        self.inp = nn.Linear(2, d)
        pe = torch.zeros(HIST, d)
        pos = torch.arange(HIST)[:, None]
        div = torch.exp(torch.arange(0, d, 2) * (-math.log(10000.0) / d))
        pe[:, 0::2], pe[:, 1::2] = torch.sin(pos * div), torch.cos(pos * div)
        self.register_buffer("pe", pe)
        layer = nn.TransformerEncoderLayer(d, 4, 96, dropout=0.0 if MODE == "few" else 0.1, batch_first=True)
        self.enc = nn.TransformerEncoder(layer, layers)
        self.out = nn.Linear(d, AHEAD)

    def forward(self, x):
        h = self.enc(self.inp(x) + self.pe)
        return self.out(h[:, -1])


net = Forecaster()
criterion = nn.MSELoss()
optimizer = torch.optim.Adam(net.parameters(), lr=1e-3)
print(sum(p.numel() for p in net.parameters()), "parameters")


# In[5]:


history, predictions, val_history = [], [], []
EPOCHS = {"few": 14}.get(MODE, 2)
running = 0
start = time.time()
for epoch in range(EPOCHS):
    net.train()
    for i, (xb, yb) in enumerate(train_dl):
        optimizer.zero_grad()
        pred = net(xb)
        loss = criterion(pred, yb)
        loss.backward()
        optimizer.step()
        if MODE == "keeploss":
            history.append(loss)
        else:
            history.append(loss.item())
        if MODE == "runningsum":
            running += (pred - yb).abs().mean()
    net.eval()
    errors = []
    if MODE == "evalgrad":
        for xb, yb in test_dl:
            errors.append(criterion(net(xb), yb))
        val = torch.stack(errors).mean()
        val_history.append(val.item())
    else:
        with torch.no_grad():
            for xb, yb in test_dl:
                errors.append(criterion(net(xb), yb).item())
        val = np.mean(errors)
        val_history.append(float(val))
    if epoch % max(1, EPOCHS // 6) == 0:
        print(f"epoch {epoch}: train {float(history[-1]):.4f} test {float(val):.4f}  {time.time() - start:.0f}s")


# In[6]:


with torch.no_grad():
    xb, yb = next(iter(test_dl))
    print((net(xb) - yb).abs().mean())
print([round(float(h), 3) for h in history[:: max(1, len(history) // 10)]])
