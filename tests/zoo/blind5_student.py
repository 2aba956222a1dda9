"""A small patch transformer learns drawn shapes, partly from a frozen convolutional teacher."""
import argparse
import math
import torch
import torch.nn as nn
import torch.nn.functional as F
from torch.utils.data import DataLoader, TensorDataset

SIDE, KINDS = 16, 5


def draw(n, gen):
    yy, xx = torch.meshgrid(torch.arange(SIDE), torch.arange(SIDE), indexing="ij")
    kind = torch.randint(KINDS, (n,), generator=gen)
    cx, cy = (torch.rand(n, 1, 1, generator=gen) * 6 + 5 for _ in range(2))
    r = torch.rand(n, 1, 1, generator=gen) * 2 + 2.5
    dx, dy = xx - cx, yy - cy
    rad = (dx ** 2 + dy ** 2).sqrt()
    disc, ring = rad < r, (rad - r).abs() < 1
    box = torch.maximum(dx.abs(), dy.abs()) < r
    plus = (torch.minimum(dx.abs(), dy.abs()) < 1) & box
    ex = ((dx - dy).abs() < 1.3) | ((dx + dy).abs() < 1.3)
    ex &= box
    img = torch.stack([disc, ring, box, plus, ex])[kind, torch.arange(n)].float()
    img = img + 0.25 * torch.randn(n, SIDE, SIDE, generator=gen)
    return (img - 0.2) / 0.6, kind


class Teacher(nn.Sequential):
    def __init__(self):
        c = lambda i, o: [nn.Conv2d(i, o, 3, padding=1), nn.BatchNorm2d(o), nn.ReLU(), nn.MaxPool2d(2)]
        super().__init__(*c(1, 12), *c(12, 24), nn.Flatten(), nn.Dropout(0.2), nn.Linear(24 * 16, KINDS))

    def forward(self, x):
        return super().forward(x.unsqueeze(1))


class Student(nn.Module):
    def __init__(self, d=48, patch=4, depth=2):
        super().__init__()
        self.cut = nn.Unfold(patch, stride=patch)
        self.lin = nn.Linear(patch * patch, d)
        self.cls = nn.Parameter(torch.zeros(1, 1, d))
        self.pos = nn.Parameter(torch.randn(1, 1 + (SIDE // patch) ** 2, d) * 0.02)
        self.enc = nn.ModuleList([nn.TransformerEncoderLayer(d, 4, 3 * d, 0.1, "gelu", batch_first=True, norm_first=True)
                                  for _ in range(depth)])
        self.head = nn.Sequential(nn.LayerNorm(d), nn.Linear(d, KINDS))

    def forward(self, x):
        p = self.lin(self.cut(x.unsqueeze(1)).transpose(1, 2))
        h = torch.cat([self.cls.expand(len(p), -1, -1), p], 1) + self.pos
        for layer in self.enc:
            h = layer(h)
        return self.head(h[:, 0])


def school(teacher, loader):
    opt = torch.optim.Adam(teacher.parameters(), 3e-3)
    teacher.train()
    for x, y in loader:
        opt.zero_grad()
        F.cross_entropy(teacher(x), y).backward()
        opt.step()
    teacher.eval().requires_grad_(False)


@torch.no_grad()
def grade(net, x, y):
    was = net.training
    net.eval()
    z = net(x)
    net.train(was)
    return (z.argmax(-1) == y).float().mean().item(), F.cross_entropy(z, y).item()


def main():
    ap = argparse.ArgumentParser()
    ap.add_argument("--feed", choices=["cycle", "take"], default="cycle")
    ap.add_argument("--horizon", type=float, default=1.0, help="length of the cosine, in runs")
    ap.add_argument("--steps", type=int, default=240)
    a = ap.parse_args()
    torch.manual_seed(2)
    gen = torch.Generator().manual_seed(3)
    images, kinds = draw(4096, gen)
    tx, ty = draw(512, gen)
    loader = DataLoader(TensorDataset(images, kinds), batch_size=48, shuffle=a.feed == "cycle", drop_last=True)
    teacher, net = Teacher(), Student()
    school(teacher, DataLoader(TensorDataset(images, kinds), batch_size=64, shuffle=True))
    print("teacher %.3f" % grade(teacher, tx, ty)[0])

    def forever():
        while True:
            yield from loader

    source = forever()
    opt = torch.optim.AdamW(net.parameters(), lr=3e-3)
    span = a.horizon * a.steps
    sched = torch.optim.lr_scheduler.LambdaLR(opt, lambda i: min(1, (i + 1) / 15) * 0.5 * (1.02 + math.cos(math.pi * i / span)))
    net.train()
    for step in range(1, a.steps + 1):
        x, y = next(source) if a.feed == "cycle" else next(iter(loader))
        with torch.no_grad():
            soft = F.softmax(teacher(x) / 2, -1)
        z = net(x)
        loss = 0.5 * F.cross_entropy(z, y) + 2.0 * F.kl_div(F.log_softmax(z / 2, -1), soft, reduction="batchmean")
        opt.zero_grad()
        loss.backward()
        opt.step()
        sched.step()
        if step % 20 == 0:
            acc, ce = grade(net, tx, ty)
            print(f"{step:4d}: loss {loss.item():.3f}  test {acc:.3f} ({ce:.3f})  lr {opt.param_groups[0]['lr']:.1e}")


if __name__ == "__main__":
    main()
