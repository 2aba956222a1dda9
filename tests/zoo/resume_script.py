"""Flat script in the manner of `--resume out/ckpt.pt`: epochs over a DataLoader, everything at module level."""
import argparse
import os
import tempfile

import torch
from torch import nn, optim
from torch.utils.data import DataLoader, TensorDataset

ap = argparse.ArgumentParser()
ap.add_argument("--restore", default="model,optim")
ap.add_argument("--momentum", type=float, default=0.9)
args = ap.parse_args()
torch.manual_seed(0)
xs = torch.randn(320, 10)
ys = (xs[:, :5].sum(1) > xs[:, 5:].sum(1)).long()
dl = DataLoader(TensorDataset(xs, ys), batch_size=32, shuffle=True)
ckpt_file = os.path.join(tempfile.mkdtemp(), "ckpt.pt")

for attempt in ("first", "again"):
    net = nn.Sequential(nn.Linear(10, 32), nn.ReLU(), nn.Linear(32, 2))
    opt = optim.SGD(net.parameters(), lr=0.05, momentum=args.momentum)
    start_epoch = 0
    if os.path.exists(ckpt_file):
        ckpt = torch.load(ckpt_file, weights_only=True)
        net.load_state_dict(ckpt["net"])
        if "optim" in args.restore:
            opt.load_state_dict(ckpt["opt"])
        start_epoch = ckpt["epoch"] + 1
        print(f"resuming after epoch {ckpt['epoch']}")
    for epoch in range(start_epoch, start_epoch + 2):
        for xb, yb in dl:
            opt.zero_grad()
            out = net(xb)
            loss = nn.functional.cross_entropy(out, yb)
            loss.backward()
            opt.step()
        print(f"epoch {epoch} loss {loss.item():.4f}")
        torch.save({"net": net.state_dict(), "opt": opt.state_dict(), "epoch": epoch}, ckpt_file)
