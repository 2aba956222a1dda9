"""Character model, own loop. --keep says what the loop holds on to between steps."""
import argparse
import collections
import copy

import torch
import torch.nn as nn
import torch.nn.functional as F

p = argparse.ArgumentParser()
p.add_argument("--keep", default="nothing")
p.add_argument("--steps", type=int, default=45)
opt = p.parse_args()
torch.manual_seed(7)

text = "the quick brown fox jumps over the lazy dog and runs away from the angry bear into the dark green wood. " * 60
chars = sorted(set(text))
data = torch.tensor([chars.index(c) for c in text])
V, T, B, D = len(chars), 48, 16, 64


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.n1, self.n2 = nn.LayerNorm(D), nn.LayerNorm(D)
        self.qkv, self.out = nn.Linear(D, 3 * D), nn.Linear(D, D)
        self.mlp = nn.Sequential(nn.Linear(D, 4 * D), nn.GELU(), nn.Linear(4 * D, D))

    def forward(self, x):
        q, k, v = (t.view(x.shape[0], -1, 4, D // 4).transpose(1, 2) for t in self.qkv(self.n1(x)).chunk(3, -1))
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + self.out(y.transpose(1, 2).reshape(x.shape))
        return x + self.mlp(self.n2(x))


class CharModel(nn.Module):
    def __init__(self):
        super().__init__()
        self.tok, self.pos = nn.Embedding(V, D), nn.Embedding(T, D)
        self.blocks = nn.ModuleList(Block() for _ in range(3))
        self.norm, self.head = nn.LayerNorm(D), nn.Linear(D, V)

    def forward(self, ids):
        x = self.tok(ids) + self.pos(torch.arange(ids.shape[1]))
        for b in self.blocks:
            x = b(x)
        return self.head(self.norm(x))


def batch():
    at = torch.randint(len(data) - T - 1, (B,)).tolist()
    return torch.stack([data[i : i + T] for i in at]), torch.stack([data[i + 1 : i + T + 1] for i in at])


model = CharModel()
for name, w in model.named_parameters():
    if w.dim() == 2:
        nn.init.normal_(w, std=0.02)
optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3)
ema = copy.deepcopy(model).requires_grad_(False)

running = 0.0
smooth = None
losses, curve = [], collections.defaultdict(list)
window = collections.deque(maxlen=25)
cache = {}
seen = {}
snapshots = []
spy = {"first": [], "last": None}
pool = []
best = None

if opt.keep in ("spy", "spydetached"):
    def stash(module, args, output):
        spy["first"].append(output if opt.keep == "spy" else output.detach())
    model.blocks[0].mlp[0].register_forward_hook(stash)
if opt.keep == "spylast":
    model.blocks[0].mlp[0].register_forward_hook(lambda m, a, o: spy.__setitem__("last", o.detach()))


def report_curve(values):
    return sum(float(v) for v in values) / max(len(values), 1)


for step in range(opt.steps):
    for group in optimizer.param_groups:
        group["lr"] = 2e-3 * min(1.0, (step + 1) / 8)
    x, y = batch()
    logits = model(x)
    loss = F.cross_entropy(logits.view(-1, V), y.view(-1))
    optimizer.zero_grad()
    loss.backward(retain_graph=opt.keep == "retained")
    nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    optimizer.step()
    # --- what is kept
    if opt.keep == "total":
        running += loss
    elif opt.keep == "smooth":
        smooth = loss if smooth is None else 0.95 * smooth + 0.05 * loss
    elif opt.keep == "retained":
        curve["train"].append({"step": step, "loss": loss})
    elif opt.keep == "outputs":
        cache[step] = (x, logits)
    elif opt.keep == "closure":
        losses.append(lambda value=loss: value / 2)
    # --- what may well be kept
    elif opt.keep == "numbers":
        losses.append(loss.item())
        running += loss.detach()
    elif opt.keep == "window":
        window.append(loss.detach())
    elif opt.keep == "log10":
        running = running + loss
        if step % 8 == 7:
            print(step, float(running) / 8)
            running = 0.0
    elif opt.keep == "best":
        if best is None or loss < best:
            best = loss
    elif opt.keep == "replay":
        pool.append((x, y))
        if len(pool) > 30:
            pool.pop(0)
    elif opt.keep == "snapshots":
        if step % 10 == 9:
            snapshots.append(copy.deepcopy(model.state_dict()))
    elif opt.keep == "ema":
        with torch.no_grad():
            for a, b in zip(ema.parameters(), model.parameters()):
                a.lerp_(b, 0.05)
    elif opt.keep == "featurecache":
        key = int(x[0, 0])
        if key not in seen:
            seen[key] = F.one_hot(x, V).float()
    elif opt.keep == "predictions":
        losses.append(logits.argmax(-1))
    if step % 10 == 0:
        print(f"step {step} loss {loss.item():.3f}")
print("end", report_curve(window))
