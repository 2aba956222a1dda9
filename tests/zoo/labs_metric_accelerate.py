"""Metric learning under Accelerate: two views of a signal, InfoNCE or a margin on distances, written out by hand."""

import argparse

import torch
from accelerate import Accelerator
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

LOSSES = ["infonce", "triplet", "batchhard"]


def make_data(count=1200, kinds=24, dim=40):
    gen = torch.Generator().manual_seed(1)
    centres = torch.randn(kinds, dim, generator=gen)
    kind = torch.randint(kinds, (count,), generator=gen)
    return centres[kind] + 0.5 * torch.randn(count, dim, generator=gen), kind


def augment(x):
    return x + 0.3 * torch.randn_like(x) * (torch.rand_like(x) > 0.2)


class Encoder(nn.Module):
    def __init__(self, dim=40, hidden=64, out=16):
        super().__init__()
        self.body = nn.Sequential(nn.Linear(dim, hidden), nn.LayerNorm(hidden), nn.GELU(), nn.Linear(hidden, hidden), nn.GELU())
        self.project = nn.Linear(hidden, out)

    def forward(self, x):
        return self.project(self.body(x))


def info_nce(a, b, args):
    a, b = nn.functional.normalize(a, dim=-1), nn.functional.normalize(b, dim=-1)
    z = torch.cat([a, b])
    temperature = 0.01 if args.fault in ("cold", "coldsafe") else 0.2
    sim = z @ z.T / temperature
    n = len(a)
    partner = torch.cat([torch.arange(n, 2 * n), torch.arange(n)])
    if args.fault == "coldsafe":
        sim = sim - sim.max(dim=1, keepdim=True).values.detach()
    weight = sim.exp()
    weight = weight * ~torch.eye(2 * n, dtype=torch.bool)
    if args.fault == "coldsafe":
        return nn.functional.cross_entropy((z @ z.T / temperature).fill_diagonal_(-1e4), partner)
    positive = weight[torch.arange(2 * n), partner]
    return -(positive / weight.sum(1)).log().mean()


def distances(z, args):
    square = (z[:, None] - z[None]).pow(2).sum(-1)
    if args.fault == "root":
        return square.sqrt()
    if args.fault == "gram":  # |a|^2 + |b|^2 - 2ab, rounding makes some of them negative
        norm = z.pow(2).sum(1)
        return (norm[:, None] + norm[None] - 2 * z @ z.T).sqrt()
    return (square + 1e-9).sqrt()


def batch_hard(z, kind, args, margin=0.5):
    d = distances(nn.functional.normalize(z, dim=-1) * 2, args)
    same = kind[:, None] == kind[None]
    furthest = (d * same).amax(1)
    nearest = d.masked_fill(same, 1e4).amin(1)
    return (furthest - nearest + margin).relu().mean()


def triplet(a, b, args):
    other = b.roll(1, 0)
    return (((a - b).norm(dim=-1)) - ((a - other).norm(dim=-1)) + 1.0).clamp(min=0).mean()


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("--loss", default="infonce", choices=LOSSES)
    parser.add_argument("--fault", default="none")
    parser.add_argument("--epochs", type=int, default=4)
    args = parser.parse_args()
    torch.manual_seed(0)
    torch.set_num_threads(1)
    accelerator = Accelerator(cpu=True, gradient_accumulation_steps=2 if args.fault == "accumulate" else 1)
    data, kind = make_data()
    model = Encoder()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    loader = DataLoader(TensorDataset(data, kind), 64, shuffle=True, drop_last=True)
    schedule = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.1, total_iters=args.epochs * len(loader))
    model, optimizer, loader, schedule = accelerator.prepare(model, optimizer, loader, schedule)
    for epoch in range(args.epochs):
        for x, k in loader:
            with accelerator.accumulate(model):
                a, b = model(augment(x)), model(augment(x))
                if args.loss == "infonce":
                    loss = info_nce(a, b, args)
                elif args.loss == "triplet":
                    if args.fault == "sameview":
                        b = model(x)
                        a = b
                    loss = triplet(a, b, args)
                else:
                    loss = batch_hard(a, k, args)
                accelerator.backward(loss)
                if accelerator.sync_gradients:
                    accelerator.clip_grad_norm_(model.parameters(), 2.0)
                optimizer.step()
                schedule.step()
                optimizer.zero_grad()
        accelerator.print(epoch, loss.item())


if __name__ == "__main__":
    main()
