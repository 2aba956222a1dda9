"""A deep network on a small classification task; `stack` says what lies between input and head."""

import sys

import torch
import torch.nn as nn
import torch.nn.functional as F

stack = sys.argv[1]
depth = int(sys.argv[2]) if len(sys.argv) > 2 else 14
torch.manual_seed(2)
torch.set_num_threads(1)
D = 32


class Highway(nn.Module):
    def __init__(self, bias):
        super().__init__()
        self.gate, self.body = nn.Linear(D, D), nn.Linear(D, D)
        nn.init.constant_(self.gate.bias, bias)

    def forward(self, x):
        open_ = torch.sigmoid(self.gate(x))
        return open_ * torch.tanh(self.body(x)) + (1 - open_) * x


class Residual(nn.Module):
    def __init__(self):
        super().__init__()
        self.norm, self.a, self.b = nn.LayerNorm(D), nn.Linear(D, 2 * D), nn.Linear(2 * D, D)

    def forward(self, x):
        return x + self.b(F.gelu(self.a(self.norm(x))))


def body():
    if stack in ("sigmoid", "tanh", "relu", "tanh-xavier"):
        act = {"sigmoid": nn.Sigmoid, "relu": nn.ReLU}.get(stack, nn.Tanh)
        layers = [part for _ in range(depth) for part in (nn.Linear(D, D), act())]
        for layer in layers:
            if isinstance(layer, nn.Linear) and stack == "relu":
                nn.init.kaiming_normal_(layer.weight, nonlinearity="relu")
            elif isinstance(layer, nn.Linear) and stack == "tanh-xavier":
                nn.init.xavier_normal_(layer.weight, gain=5 / 3)
        return nn.Sequential(*layers)
    if stack == "residual":
        return nn.Sequential(*(Residual() for _ in range(depth)))
    if stack.startswith("highway"):
        return nn.Sequential(*(Highway(float(stack[7:])) for _ in range(min(depth, 4))))
    layer = nn.TransformerEncoderLayer(D, 4, 64, 0.0, batch_first=True, norm_first=stack == "prenorm")
    return nn.TransformerEncoder(layer, depth, enable_nested_tensor=False)


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.enter, self.body, self.leave = nn.Linear(8, D), body(), nn.Linear(D, 3)

    def forward(self, x):
        h = self.body(self.enter(x))
        return self.leave(h.mean(1))


net = Net()
opt = torch.optim.Adam(net.parameters(), lr=1e-3)
for _ in range(40):
    kinds = torch.randint(0, 3, (48,))
    x = torch.randn(48, 5, 8) + F.one_hot(kinds, 8).float().unsqueeze(1)
    loss = F.cross_entropy(net(x), kinds)
    opt.zero_grad()
    loss.backward()
    opt.step()
print(f"last loss {loss.item():.3f}")
