"""Small habits of healthy trainings: phases, fine-tuning at a small rate, going on after all is learnt, stopping early ...

    python fresh1_phases.py HABIT
"""
import copy
import random
import sys

import torch
import torch.nn.functional as F
from torch import nn

habit = sys.argv[1]
random.seed(2)
torch.manual_seed(2)


class Tower(nn.Module):
    def __init__(self, vocab, classes, width=32, length=16, drop=0.0, causal=False):
        super().__init__()
        self.causal = causal
        self.embed = nn.Embedding(vocab, width)
        self.where = nn.Parameter(torch.randn(length, width) * 0.02)
        layer = nn.TransformerEncoderLayer(width, 2, 4 * width, drop, "gelu", batch_first=True, norm_first=True)
        self.tower = nn.TransformerEncoder(layer, 2, norm=nn.LayerNorm(width), enable_nested_tensor=False)
        self.top = nn.Linear(width, classes)

    def forward(self, ids):
        t = ids.shape[1]
        mask = torch.full((t, t), float("-inf")).triu(1) if self.causal else None
        h = self.tower(self.embed(ids) + self.where[:t], mask=mask)
        return self.top(h if self.causal else h.mean(1))


def majority(n, vocab=10, noise=0.0):
    x = torch.randint(0, vocab, (n, 12))
    y = (x < vocab // 2).sum(1).clamp(3, 9) - 3
    y = torch.where(torch.rand(n) < noise, torch.randint(0, 7, (n,)), y)
    return x, y


def counting(n, length=16):
    start = torch.randint(0, 20, (n, 1))
    return (start + torch.arange(length + 1)) % 20


def steps_of(model, opt, n, data, loss_fn=F.cross_entropy, size=32):
    x, y = data
    model.train()
    for _ in range(n):
        i = torch.randint(len(x), (size,))
        loss = loss_fn(model(x[i]), y[i])
        opt.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        opt.step()
    return loss.item()


@torch.no_grad()
def score(model, data):
    model.eval()
    out = model(data[0])
    return F.cross_entropy(out, data[1]).item(), (out.argmax(-1) == data[1]).float().mean().item()


if habit == "finetune":  # pretrain quickly, then adapt at a small rate, as one does
    model, base = Tower(10, 7), majority(4000)
    print(steps_of(model, torch.optim.AdamW(model.parameters(), 3e-3), 200, base))
    shifted = majority(800, noise=0.1)
    opt = torch.optim.AdamW(model.parameters(), 2e-5)
    for _ in range(5):
        print(steps_of(model, opt, 30, shifted), score(model, majority(300, noise=0.1)))
elif habit == "smallrate":  # only the second half of the above: start from a checkpoint's weights
    model, base = Tower(10, 7), majority(4000)
    import io

    file = io.BytesIO()
    torch.save(model.state_dict(), file)
    for p in model.parameters():
        p.requires_grad_(True)
    print(steps_of(model, torch.optim.Adam(model.parameters(), 1e-3, betas=(0.9, 0.999)), 260, base))
elif habit == "converged":  # everything is known after 150 steps; 400 are run
    model = Tower(20, 20, causal=True)
    opt = torch.optim.AdamW(model.parameters(), 3e-3)
    for step in range(400):
        rows = counting(16)
        loss = F.cross_entropy(model(rows[:, :-1]).flatten(0, 1), rows[:, 1:].flatten())
        opt.zero_grad(), loss.backward(), opt.step()
        if step % 50 == 0:
            print(step, loss.item())
elif habit == "counting":  # the text itself repeats, so may what is generated
    model = Tower(20, 20, causal=True, length=64)
    opt = torch.optim.AdamW(model.parameters(), 3e-3)
    for step in range(200):
        rows = counting(16, 63)
        loss = F.cross_entropy(model(rows[:, :-1]).flatten(0, 1), rows[:, 1:].flatten())
        opt.zero_grad(), loss.backward(), opt.step()
    model.eval()
    ids = torch.tensor([[7]])
    with torch.no_grad():
        for _ in range(60):
            ids = torch.cat([ids, model(ids)[:, -1].argmax(-1, keepdim=True)], 1)
    print(ids[0].tolist())
elif habit == "earlystop":  # few rows; stops when validation has not improved and takes the best weights back
    train, held = majority(160, noise=0.2), majority(300, noise=0.2)
    model = Tower(10, 7, drop=0.1)
    opt = torch.optim.AdamW(model.parameters(), 3e-3, weight_decay=0.1)
    best, kept, bad = float("inf"), None, 0
    for epoch in range(40):
        last = steps_of(model, opt, 10, train, size=16)
        value, right = score(model, held)
        if value < best:
            best, kept, bad = value, copy.deepcopy(model.state_dict()), 0
        else:
            bad += 1
        print(epoch, round(last, 3), round(value, 3), round(right, 2))
        if bad == 3:
            break
    model.load_state_dict(kept)
    print("kept", score(model, held))
elif habit == "smoothing":  # label smoothing keeps the loss high
    model, data = Tower(10, 7), majority(4000)
    print(steps_of(model, torch.optim.AdamW(model.parameters(), 2e-3), 250, data, nn.CrossEntropyLoss(label_smoothing=0.3)))
    print(score(model, majority(300)))
elif habit == "gradual":  # head first, then all with a new optimizer and discriminative rates
    model, data = Tower(10, 7), majority(4000)
    model.tower.requires_grad_(False), model.embed.requires_grad_(False)
    model.where.requires_grad_(False)
    print(steps_of(model, torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], 5e-3), 80, data))
    model.requires_grad_(True)
    opt = torch.optim.AdamW([{"params": [*model.tower.parameters(), model.where, *model.embed.parameters()], "lr": 1e-3}, {"params": model.top.parameters(), "lr": 2e-3}])
    print(steps_of(model, opt, 150, data), score(model, majority(300)))
elif habit == "functional":  # autograd.grad, clipped by hand, momentum by hand
    model, data = Tower(10, 7), majority(4000)
    params = list(model.parameters())
    velocity = [torch.zeros_like(p) for p in params]
    for step in range(260):
        i = torch.randint(len(data[0]), (32,))
        grads = torch.autograd.grad(F.cross_entropy(model(data[0][i]), data[1][i]), params)
        norm = torch.stack([g.norm() for g in grads]).norm()
        with torch.no_grad():
            for p, g, v in zip(params, grads, velocity):
                v.mul_(0.9).add_(g * min(1.0, 1.0 / float(norm)))
                p.sub_(0.05 * v)
    print(score(model, majority(300)))
elif habit == "swa":  # constant high rate, weights averaged over the tail, statistics of the last
    model, data = Tower(10, 7), majority(4000)
    opt = torch.optim.SGD(model.parameters(), 0.1, momentum=0.9)
    mean = torch.optim.swa_utils.AveragedModel(model)
    sched = torch.optim.swa_utils.SWALR(opt, swa_lr=0.03, anneal_epochs=3)
    for epoch in range(12):
        print(epoch, steps_of(model, opt, 25, data), score(model, majority(300)))
        if epoch >= 8:
            mean.update_parameters(model)
            sched.step()
    print(score(mean, majority(300)))
elif habit == "sweep":  # three rates one after another in one process, the best one is kept
    for lr in (1e-4, 1e-3, 5e-3):
        torch.manual_seed(0)
        model, data = Tower(10, 7), majority(2000)
        print(lr, steps_of(model, torch.optim.AdamW(model.parameters(), lr), 100, data), score(model, majority(300)))
