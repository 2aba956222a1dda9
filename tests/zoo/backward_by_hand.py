"""Layers with hand-written backward passes: right ones, wrong ones, and gradients that are something else on purpose."""
import sys

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch.autograd import Function

kind = sys.argv[1] if len(sys.argv) > 1 else "rmsnorm"
V, T, D = 24, 12, 32


class RMS(Function):
    @staticmethod
    def forward(ctx, x, w, eps):
        r = torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + eps)
        ctx.save_for_backward(x, w, r)
        return x * r * w

    @staticmethod
    def backward(ctx, g):
        x, w, r = ctx.saved_tensors
        gw = (g * x * r).sum(dim=tuple(range(g.dim() - 1)))
        gx = g * w * r
        if kind != "rmsnorm-wrong":
            gx = gx - x * r.pow(3) * (g * w * x).mean(-1, keepdim=True)
        return gx, gw, None


class Swish(Function):
    @staticmethod
    def forward(x):
        return x * torch.sigmoid(x)

    @staticmethod
    def setup_context(ctx, inputs, output):
        ctx.save_for_backward(inputs[0])

    @staticmethod
    def backward(ctx, g):
        (x,) = ctx.saved_tensors
        s = torch.sigmoid(x)
        return g * s if kind == "swish-wrong" else g * (s + x * s * (1 - s))


class Dense(Function):
    @staticmethod
    def forward(ctx, x, w, b):
        ctx.save_for_backward(x, w)
        return x @ w.t() + b

    @staticmethod
    def backward(ctx, g):
        x, w = ctx.saved_tensors
        gx = g @ w
        gw = g.flatten(0, -2).t() @ x.flatten(0, -2)
        gb = g.flatten(0, -2).sum(0) if kind != "dense-wrong" else g.flatten(0, -2).mean(0)
        return gx, gw, gb


class CrossEntropy(Function):
    @staticmethod
    def forward(ctx, logits, target):
        logp = logits.log_softmax(-1)
        ctx.save_for_backward(logp, target)
        return -logp.gather(1, target[:, None]).mean()

    @staticmethod
    def backward(ctx, g):
        logp, target = ctx.saved_tensors
        grad = logp.exp()
        if kind == "entropy-wrong":
            grad[torch.arange(len(target)), target] -= 0.5
        else:
            grad[torch.arange(len(target)), target] -= 1
        return g * grad / len(target), None


class Round(Function):
    @staticmethod
    def forward(ctx, x):
        return (x * 8).round() / 8

    @staticmethod
    def backward(ctx, g):
        return g


class Spike(Function):
    @staticmethod
    def forward(ctx, x):
        ctx.save_for_backward(x)
        return (x > 0).to(x.dtype)

    @staticmethod
    def backward(ctx, g):
        (x,) = ctx.saved_tensors
        return g / (1 + 4 * x.abs()) ** 2


class Reverse(Function):
    @staticmethod
    def forward(ctx, x, lam):
        ctx.lam = lam
        return x.view_as(x)

    @staticmethod
    def backward(ctx, g):
        return -ctx.lam * g, None


class Bound(Function):
    """Clamps, and lets the gradient through everywhere."""

    @staticmethod
    def forward(ctx, x, lo, hi):
        return x.clamp(lo, hi)

    @staticmethod
    def backward(ctx, g):
        return g, None, None


class StepSize(Function):
    """Learned quantisation: gradients for values and for the step size."""

    @staticmethod
    def forward(ctx, x, s):
        ctx.save_for_backward(x, s)
        return (x / s).round().clamp(-8, 7) * s

    @staticmethod
    def backward(ctx, g):
        x, s = ctx.saved_tensors
        q = x / s
        inside = (q >= -8) & (q <= 7)
        gs = torch.where(inside, q.round() - q, q.clamp(-8, 7)) * g
        return g * inside, gs.sum().view_as(s)


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.emb, self.pos = nn.Embedding(V, D), nn.Parameter(torch.randn(T, D) * 0.02)
        self.w, self.scale = nn.Parameter(torch.ones(D)), nn.Parameter(torch.tensor(0.1))
        self.up, self.down, self.head = nn.Linear(D, 2 * D), nn.Linear(2 * D, D), nn.Linear(D, V)
        self.rnn = nn.GRU(D, D, batch_first=True)
        self.side = nn.Linear(D, 3)

    def norm(self, x):
        return RMS.apply(x, self.w, 1e-6) if kind.startswith("rmsnorm") else F.rms_norm(x, (D,), self.w)

    def act(self, x):
        if kind.startswith("swish"):
            return Swish.apply(x)
        if kind == "bound":
            return Bound.apply(F.gelu(x), -1.0, 1.0)
        if kind == "spike":
            return Spike.apply(x)
        if kind == "round":
            return Round.apply(F.gelu(x))
        if kind == "lsq":
            return StepSize.apply(x, self.scale)
        return F.gelu(x)

    def forward(self, ids):
        h = self.emb(ids) + self.pos
        h = h + self.rnn(h)[0]
        h = h + self.down(self.act(self.up(self.norm(h))))
        logits = Dense.apply(h, self.head.weight, self.head.bias) if kind.startswith("dense") else self.head(h)
        if kind == "reverse":
            return logits, self.side(Reverse.apply(h, 0.1))
        return logits, None


torch.manual_seed(0)
net = Net()
opt = torch.optim.AdamW(net.parameters(), lr=2e-3)
for it in range(30):
    start = torch.randint(V, (16, 1))
    ids = (start + torch.randint(1, 4, (16, 1)) * torch.arange(T + 1)) % V
    logits, side = net(ids[:, :-1])
    flat, target = logits.flatten(0, 1), ids[:, 1:].flatten()
    loss = CrossEntropy.apply(flat, target) if kind.startswith("entropy") else F.cross_entropy(flat, target)
    if side is not None:
        loss = loss + 0.1 * F.cross_entropy(side.flatten(0, 1), (ids[:, :-1] % 3).flatten())
    opt.zero_grad()
    loss.backward()
    opt.step()
    if it % 10 == 0:
        print(it, round(loss.item(), 4))
