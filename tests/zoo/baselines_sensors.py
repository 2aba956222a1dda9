"""Regression of one number from a window of sensor readings; a class that trains itself, data from a DataLoader."""

import argparse

import torch
from torch import nn
from torch.utils.data import DataLoader, Dataset

p = argparse.ArgumentParser()
p.add_argument("--data", default="good", help="good, noisy (as much noise as signal), zeroed, shifted (targets of other windows), gaussian")
p.add_argument("--few", type=int, default=0, help="train on so few windows, many times")
a = p.parse_args()
torch.manual_seed(1)
torch.set_num_threads(1)


class Windows(Dataset):
    def __init__(self, count, seed):
        g = torch.Generator().manual_seed(seed)
        time = torch.arange(32) * 0.2
        speed, start = 0.5 + torch.rand(count, 1, generator=g), 6.28 * torch.rand(count, 1, generator=g)
        self.x = torch.sin(speed * time + start) + 0.1 * torch.randn(count, 32, generator=g)
        self.y = torch.sin(speed * 32 * 0.2 + start)
        if a.data == "noisy":
            self.y = self.y + 0.7 * torch.randn(count, 1, generator=g)
        if a.data == "shifted":
            self.y = self.y[torch.randperm(count, generator=g)]
        if a.data == "gaussian":
            self.x, self.y = torch.randn(count, 32, generator=g), torch.randn(count, 1, generator=g)

    def __len__(self):
        return len(self.x)

    def __getitem__(self, index):
        return (0 * self.x[index] if a.data == "zeroed" else self.x[index]), self.y[index]


class Forecaster(nn.Module):
    def __init__(self, width=64):
        super().__init__()
        self.net = nn.Sequential(nn.Linear(32, width), nn.GELU(), nn.Linear(width, width), nn.GELU(), nn.Linear(width, 1))
        self.criterion = nn.MSELoss()
        self.optimizer = torch.optim.Adam(self.parameters(), lr=2e-3)

    def fit(self, train, test, epochs):
        for epoch in range(epochs):
            self.train()
            for x, y in train:
                self.optimizer.zero_grad()
                loss = self.criterion(self.net(x), y)
                loss.backward()
                self.optimizer.step()
            self.eval()
            with torch.inference_mode():
                total = sum(self.criterion(self.net(x), y).item() * len(x) for x, y in test) / len(test.dataset)
            if epoch % max(1, epochs // 8) == 0:
                print(epoch, loss.item(), total)


if a.few:
    train = DataLoader(Windows(a.few, 0), batch_size=16, shuffle=True)
    Forecaster().fit(train, DataLoader(Windows(400, 1), batch_size=100), epochs=60)
else:
    Forecaster().fit(DataLoader(Windows(1600, 0), batch_size=32, shuffle=True), DataLoader(Windows(400, 1), batch_size=100), epochs=6)
