"""Regression by a class-based trainer on several ranks; or one model whose hidden layer is split over the ranks."""

import argparse

import torch
import torch.distributed as dist
import torch.nn as nn
from torch.nn.parallel import DistributedDataParallel as DDP
from torch.utils.data import DataLoader, DistributedSampler, IterableDataset, TensorDataset, get_worker_info


class Reduce(torch.autograd.Function):
    """Sums over the ranks; each rank's gradient is the whole one."""

    @staticmethod
    def forward(ctx, x):
        x = x.clone()
        dist.all_reduce(x)
        return x

    @staticmethod
    def backward(ctx, grad):
        return grad


class Split(nn.Module):
    """Each rank holds half of the hidden units."""

    def __init__(self, inputs, hidden, world, rank):
        super().__init__()
        torch.manual_seed(100 + rank)
        self.up = nn.Linear(inputs, hidden // world)
        self.down = nn.Linear(hidden // world, 1, bias=False)

    def forward(self, x):
        return Reduce.apply(self.down(torch.tanh(self.up(x))))


class Stream(IterableDataset):
    def __init__(self, x, y, rank, world, share):
        self.x, self.y, self.rank, self.world, self.share = x, y, rank, world, share

    def __iter__(self):
        assert get_worker_info() is None
        start, stride = (self.rank, self.world) if self.share else (0, 1)
        for i in range(start, len(self.x), stride):
            yield self.x[i], self.y[i]


class Trainer:
    def __init__(self, args):
        self.args = args
        dist.init_process_group("gloo")
        self.rank, self.world = dist.get_rank(), dist.get_world_size()
        torch.set_num_threads(1)
        gen = torch.Generator().manual_seed(5)
        x = torch.randn(768, 8, generator=gen)
        y = torch.sin(x @ torch.randn(8, 1, generator=gen)) + 0.05 * torch.randn(768, 1, generator=gen)
        if args.mode == "split":
            self.model = Split(8, 64, self.world, self.rank)
            self.loader = DataLoader(TensorDataset(x, y), 32, shuffle=True, generator=torch.Generator().manual_seed(0))
        else:
            torch.manual_seed(0)
            net = nn.Sequential(nn.Linear(8, 64), nn.Tanh(), nn.Linear(64, 1))
            self.model = DDP(net)
            if args.mode == "stream":
                self.loader = DataLoader(Stream(x, y, self.rank, self.world, True), 32)
            elif args.mode == "whole-stream":
                self.loader = DataLoader(Stream(x, y, self.rank, self.world, False), 32)
            elif args.mode == "fixed-rank":
                self.loader = DataLoader(TensorDataset(x, y), 32, sampler=DistributedSampler(x, self.world, rank=0))
            elif args.mode == "full-batch":
                self.loader = [(x, y)] * 12
            else:
                self.loader = DataLoader(TensorDataset(x, y), 32, sampler=DistributedSampler(x, self.world, self.rank))
        self.opt = torch.optim.Adam(self.model.parameters(), lr=2e-3)

    def run(self):
        for epoch in range(2):
            if isinstance(getattr(self.loader, "sampler", None), DistributedSampler):
                self.loader.sampler.set_epoch(epoch)
            for xb, yb in self.loader:
                self.opt.zero_grad()
                loss = ((self.model(xb) - yb) ** 2).mean()
                loss.backward()
                self.opt.step()
            if self.rank == 0:
                print(f"epoch {epoch}: {loss.item():.4f}", flush=True)
        dist.destroy_process_group()


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("mode", nargs="?", default="sampler")
    Trainer(parser.parse_args()).run()
