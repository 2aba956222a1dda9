import sys
from collections import OrderedDict
from itertools import cycle

import torch
from torch import nn

# --- knobs -----------------------------------------------------------------
WHAT = sys.argv[1] if len(sys.argv) > 1 else "find"
torch.manual_seed(21)
torch.set_printoptions(precision=3)
device = torch.device("cuda" if torch.cuda.is_available() else "cpu")


# --- data: balanced brackets, five kinds; label = which kind is wrong (or none) ---
def brackets(n, length=32):
    g = torch.Generator().manual_seed(n)
    opens, rows, labels = "([{<", [], []
    closes = ")]}>"
    for _ in range(n):
        stack, s = [], []
        while len(s) + len(stack) < length:
            if stack and torch.rand((), generator=g) < 0.45:
                s.append(closes[stack.pop()])
            else:
                k = int(torch.randint(4, (), generator=g))
                stack.append(k)
                s.append(opens[k])
        while stack:
            s.append(closes[stack.pop()])
        s = s[:length]
        label = int(torch.randint(3, (), generator=g))
        ids = [(opens + closes).index(c) for c in s]
        # 0: mostly round, 1: as drawn, 2: reversed order
        if label == 0:
            ids = [0 if i < 4 and j % 2 else i for j, i in enumerate(ids)]
        if label == 2:
            ids = ids[::-1]
        rows.append(ids)
        labels.append(label)
    return torch.tensor(rows), torch.tensor(labels)


X, Y = brackets(1200)
XV, YV = brackets(301)
if WHAT == "shuffledlabels":
    Y = Y[torch.randperm(len(Y), generator=torch.Generator().manual_seed(0))]


# --- model -------------------------------------------------------------------
def make_model(depth=2, d=32):
    class AddPositions(nn.Module):
        def __init__(self):
            super().__init__()
            self.table = nn.Parameter(torch.zeros(32, d).normal_(0, 0.1))

        def forward(self, x):
            return x + self.table

    class Residual(nn.Module):
        def __init__(self, f):
            super().__init__()
            self.norm, self.f = nn.LayerNorm(d), f

        def forward(self, x):
            return self.f(self.norm(x)) if WHAT == "noresidual" else x + self.f(self.norm(x))

    class SelfAttention(nn.Module):
        def __init__(self):
            super().__init__()
            self.mha = nn.MultiheadAttention(d, 4, batch_first=True)

        def forward(self, x):
            return self.mha(x, x, x, need_weights=False)[0]

    class Pool(nn.Module):
        def forward(self, x):
            return x.mean(1)

    def ff():
        act = nn.Sigmoid() if WHAT == "sigmoids" else nn.ReLU()
        return nn.Sequential(nn.Linear(d, 64), act, nn.Linear(64, d))

    parts = [("emb", nn.Embedding(8, d)), ("pos", AddPositions())]
    if WHAT == "sigmoids":  # a plain deep stack
        for i in range(12):
            parts.append((f"lin{i}", nn.Sequential(nn.Linear(d, d), nn.Sigmoid())))
    else:
        for i in range(depth):
            parts += [(f"attn{i}", Residual(SelfAttention())), (f"ff{i}", Residual(ff()))]
    head = [nn.Linear(d, 3)]
    if WHAT == "tanhhead":
        head += [nn.Tanh()]
    if WHAT == "sigmoidhead":
        head += [nn.Sigmoid()]
    parts += [("pool", Pool()), ("norm", nn.LayerNorm(d)), ("head", nn.Sequential(*head))]
    return nn.Sequential(OrderedDict(parts)).to(device)


class Learner:
    def __init__(self, model, loss_fn=nn.CrossEntropyLoss()):
        self.model, self.loss_fn = model, loss_fn

    def batches(self, bs=32):
        order = torch.randperm(len(X))
        for i in range(0, len(order) - bs + 1, bs):
            yield X[order[i : i + bs]].to(device), Y[order[i : i + bs]].to(device)

    def lr_find(self, lo=1e-6, hi=3.0, n=60):
        saved = {k: v.clone() for k, v in self.model.state_dict().items()}
        opt = torch.optim.Adam(self.model.parameters(), lr=lo)
        lrs, losses, best = [], [], float("inf")
        for i, (x, y) in zip(range(n), cycle(self.batches())):
            lr = lo * (hi / lo) ** (i / (n - 1))
            opt.param_groups[0]["lr"] = lr
            loss = self.loss_fn(self.model(x), y)
            opt.zero_grad()
            loss.backward()
            opt.step()
            lrs.append(lr), losses.append(loss.item())
            best = min(best, losses[-1])
            if losses[-1] > 4 * best:
                break
        self.model.load_state_dict(saved)
        at = min(range(len(losses)), key=losses.__getitem__)
        print(f"lr_find: lowest loss {losses[at]:.3f} at {lrs[at]:.1e}, stopped at {lrs[-1]:.1e}")
        return lrs[at] / 5

    def fit(self, epochs, lr):
        opt = torch.optim.Adam(self.model.parameters(), lr=lr)
        per_epoch = len(X) // 32
        sched = torch.optim.lr_scheduler.CosineAnnealingLR(opt, epochs * per_epoch)
        if WHAT == "unclamped":
            sched = torch.optim.lr_scheduler.CosineAnnealingLR(opt, epochs * per_epoch // 3)
        for epoch in range(epochs):
            self.model.train()
            for x, y in self.batches():
                loss = self.loss_fn(self.model(x), y)
                opt.zero_grad()
                loss.backward()
                opt.step()
                sched.step()
            print(epoch, f"{loss.item():.3f}", "accuracy {:.2f}".format(self.accuracy()))

    @torch.inference_mode()
    def accuracy(self):
        self.model.eval()
        return (self.model(XV.to(device)).argmax(-1) == YV.to(device)).float().mean().item()


learner = Learner(make_model())
lr = learner.lr_find() if WHAT == "find" else 3e-3
if WHAT == "highlr":
    lr = 6e-2
if WHAT == "lowlr":
    lr = 2e-6
print("lr", lr)
learner.fit(5, min(lr, 1e-2) if WHAT == "find" else lr)
