"""The same small language model with its weights in different precisions and optimizers."""

import sys

import torch
import torch.nn as nn
import torch.nn.functional as F

mode = sys.argv[1]
torch.manual_seed(4)
torch.set_num_threads(1)
V, D, N = 23, 40, 16


class Tiny(nn.Module):
    def __init__(self):
        super().__init__()
        self.words, self.places = nn.Embedding(V, D), nn.Embedding(N, D)
        layer = nn.TransformerEncoderLayer(D, 2, 80, 0.0, batch_first=True, norm_first=True, activation="gelu")
        self.body = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)
        self.norm, self.out = nn.LayerNorm(D), nn.Linear(D, V)

    def forward(self, ids):
        t = ids.shape[1]
        mask = torch.triu(torch.ones(t, t, dtype=torch.bool), 1)
        h = self.words(ids) + self.places(torch.arange(t))
        return self.out(self.norm(self.body(h, mask=mask)))


class Rounding(torch.optim.Optimizer):
    """Adam in float32 on bfloat16 weights; what rounding would lose is kept by chance, or in a second number."""

    def __init__(self, params, lr, keep):
        super().__init__(params, {"lr": lr})
        self.keep = keep

    @torch.no_grad()
    def step(self, closure=None):
        for group in self.param_groups:
            for p in group["params"]:
                if p.grad is None:
                    continue
                s = self.state[p]
                if not s:
                    s["m"], s["v"], s["t"] = torch.zeros_like(p, dtype=torch.float32), torch.zeros_like(p, dtype=torch.float32), 0
                    s["rest"] = torch.zeros_like(p, dtype=torch.float32)
                g = p.grad.float()
                s["t"] += 1
                s["m"].lerp_(g, 0.1)
                s["v"].lerp_(g * g, 0.01)
                new = p.float() + s["rest"] - group["lr"] * (s["m"] / (1 - 0.9 ** s["t"])) / ((s["v"] / (1 - 0.99 ** s["t"])).sqrt() + 1e-8)
                if self.keep == "chance":
                    bits = new.view(torch.int32) + torch.randint(0, 1 << 16, new.shape, dtype=torch.int32)
                    p.copy_((bits & -65536).view(torch.float32))
                else:
                    p.copy_(new)
                    s["rest"] = new - p.float()


net = Tiny()
rate = 1e-5
if mode in ("adamw", "sgd", "half", "stochastic", "kahan", "high-rate", "masters"):
    net = net.to(torch.float16 if mode == "half" else torch.bfloat16)
masters = [p.detach().float().requires_grad_(True) for p in net.parameters()]
if mode == "sgd":
    opt = torch.optim.SGD(net.parameters(), lr=1e-3)
elif mode in ("stochastic", "kahan"):
    opt = Rounding(net.parameters(), rate, "chance" if mode == "stochastic" else "rest")
elif mode == "masters":
    opt = torch.optim.AdamW(masters, lr=1e-3)
elif mode == "half":
    opt = torch.optim.AdamW(net.parameters(), lr=2e-6, eps=1e-4)
else:
    opt = torch.optim.AdamW(net.parameters(), lr=1e-3 if mode in ("autocast", "high-rate", "float32", "warmup") else rate)
ids = torch.randint(0, V, (4000,))
for i in range(2, len(ids)):
    if i % 5:
        ids[i] = (ids[i - 1] * 3 + ids[i - 2]) % V
for step in range(40):
    at = torch.randint(0, len(ids) - N - 1, (12,))
    x = torch.stack([ids[i : i + N] for i in at])
    y = torch.stack([ids[i + 1 : i + 1 + N] for i in at])
    if mode == "warmup":
        opt.param_groups[0]["lr"] = 1e-3 * min(1.0, (step + 1) / 30)
    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=mode == "autocast"):
        logits = net(x)
    loss = F.cross_entropy(logits.float().flatten(0, 1), y.flatten())
    net.zero_grad()
    loss.backward()
    if mode == "masters":
        for m, p in zip(masters, net.parameters()):
            m.grad = p.grad.float()
    opt.step()
    if mode == "masters":
        with torch.no_grad():
            for m, p in zip(masters, net.parameters()):
                p.copy_(m)
print(f"last loss {loss.item():.3f}")
