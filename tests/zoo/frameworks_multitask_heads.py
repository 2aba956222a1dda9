"""One encoder, several tasks: a loss per head, each with its own backward, or tasks in turn, or one sum."""

import sys

import torch
import torch.nn.functional as F
from torch import nn

torch.set_num_threads(1)
torch.manual_seed(5)
scheme = sys.argv[1] if len(sys.argv) > 1 else "sum"


class Shared(nn.Module):
    def __init__(self):
        super().__init__()
        self.embed = nn.Embedding(40, 32)
        self.encoder = nn.TransformerEncoder(
            nn.TransformerEncoderLayer(32, 4, 64, batch_first=True, dropout=0.0), 2, enable_nested_tensor=False
        )
        self.heads = nn.ModuleDict({"parity": nn.Linear(32, 2), "largest": nn.Linear(32, 40), "mean": nn.Linear(32, 1)})

    def forward(self, x, task=None):
        h = self.encoder(self.embed(x)).mean(1)
        return self.heads[task](h) if task else {name: head(h) for name, head in self.heads.items()}


def losses(out, x):
    target = {"parity": x.sum(1) % 2, "largest": x.amax(1), "mean": x.float().mean(1, keepdim=True) / 40}
    return [F.mse_loss(o, target[n]) if n == "mean" else F.cross_entropy(o, target[n]) for n, o in out.items()]


net = Shared()
opt = torch.optim.Adam(net.parameters(), lr=1e-3)
sched = torch.optim.lr_scheduler.LambdaLR(opt, lambda s: min(1.0, (s + 1) / 10))
for step in range(60):
    x = torch.randint(0, 40, (24, 10))
    opt.zero_grad()
    if scheme == "turns":
        task = ["parity", "largest", "mean"][step % 3]
        total = losses({task: net(x, task)}, x)[0]
        total.backward()
    elif scheme == "each":
        total = 0.0
        for task in net.heads:
            part = losses({task: net(x, task)}, x)[0]
            part.backward()
            total += part.item()
    elif scheme == "chain":
        parts = losses(net(x), x)
        for i, part in enumerate(parts):
            part.backward(retain_graph=i < len(parts) - 1)
        total = sum(parts)
    elif scheme == "delayed":
        parts = losses(net(x), x)
        total = parts[0] + parts[1] if step < 20 else sum(parts)
        total.backward()
    elif scheme == "forgotten":
        parts = losses({k: v.detach() if k == "mean" else v for k, v in net(x).items()}, x)
        total = sum(parts)
        total.backward()
    else:
        total = sum(losses(net(x), x))
        total.backward()
    opt.step()
    sched.step()
    if step % 20 == 0:
        print(step, float(total))
