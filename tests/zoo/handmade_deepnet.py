"""A deep plain network for regression: with or without normalisation, with clean and dirty batches."""
import argparse
import torch
import torch.nn as nn

ap = argparse.ArgumentParser()
ap.add_argument("--depth", type=int, default=8)
ap.add_argument("--norm", default="layer")
ap.add_argument("--lr", type=float, default=1e-3)
ap.add_argument("--optim", default="adam")
ap.add_argument("--clip", type=float, default=0)
ap.add_argument("--outlier", action="store_true")
ap.add_argument("--init-scale", type=float, default=1.0)
ap.add_argument("--nan-weight", action="store_true")
ap.add_argument("--steps", type=int, default=80)
a = ap.parse_args()
torch.manual_seed(0)
torch.set_num_threads(1)


class Res(nn.Module):
    def __init__(self, w):
        super().__init__()
        self.norm = {"layer": nn.LayerNorm, "none": lambda w: nn.Identity()}[a.norm](w)
        self.l1, self.l2 = nn.Linear(w, 2 * w), nn.Linear(2 * w, w)
        with torch.no_grad():
            self.l1.weight.mul_(a.init_scale), self.l2.weight.mul_(a.init_scale)

    def forward(self, x):
        return x + self.l2(torch.relu(self.l1(self.norm(x))))


model = nn.Sequential(nn.Linear(16, 64), *[Res(64) for _ in range(a.depth)], nn.Linear(64, 1))
if a.nan_weight:
    model[2].l1.weight.data[3, 3] = float("nan")
opt = {"adam": torch.optim.Adam, "sgd": torch.optim.SGD}[a.optim](model.parameters(), lr=a.lr)
mse = nn.MSELoss()
w = torch.randn(16)
for step in range(a.steps):
    x = torch.randn(64, 16)
    y = (x @ w + (x[:, 0] * x[:, 1])).unsqueeze(1)
    if a.outlier and step == 50:
        x = x * 300
        y = -y * 300
    loss = mse(model(x), y)
    opt.zero_grad()
    loss.backward()
    if a.clip:
        nn.utils.clip_grad_norm_(model.parameters(), a.clip)
    opt.step()
    if step % 20 == 0:
        print(step, loss.item())
