"""Two processes train one small classifier on halves of the data."""

import os
import sys

import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel as DDP
from torch.utils.data import DataLoader, TensorDataset
from torch.utils.data.distributed import DistributedSampler

bare = "bare" in sys.argv[1:]
torch.set_num_threads(1)
dist.init_process_group("gloo")
rank = int(os.environ["RANK"])
g = torch.Generator().manual_seed(1)
x = torch.randn(1280, 24, generator=g)
y = (x[:, :8].sum(1) > 0).long() + 2 * (x[:, 8:16].prod(1) > 0).long()
data = TensorDataset(x, y)
sampler = DistributedSampler(data, shuffle=True)
torch.manual_seed(100 if not bare else 100 + rank)
core = nn.Sequential(nn.Linear(24, 64), nn.LayerNorm(64), nn.GELU(), nn.Linear(64, 64), nn.GELU(), nn.Linear(64, 4))
model = core if bare else DDP(core)
opt = torch.optim.AdamW(model.parameters(), 2e-3)
for epoch in range(5):
    sampler.set_epoch(epoch)
    for xb, yb in DataLoader(data, 32, sampler=sampler):
        loss = nn.functional.cross_entropy(model(xb), yb)
        opt.zero_grad()
        loss.backward()
        opt.step()
    if rank == 0:
        print(epoch, loss.item())
dist.destroy_process_group()
