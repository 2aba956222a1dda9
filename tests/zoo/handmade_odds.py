"""Small jobs that look odd and are fine, and a few that are not; pick one by name."""
import itertools
import random
import sys

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch.utils.data import DataLoader, IterableDataset, get_worker_info

torch.manual_seed(0)
torch.set_num_threads(1)


def mlp(*w, act=nn.ReLU):
    parts = []
    for a, b in itertools.pairwise(w):
        parts += [nn.Linear(a, b), act()]
    return nn.Sequential(*parts[:-1])


def overfit_one_batch():
    """Ten examples to zero loss, on purpose."""
    net = mlp(10, 64, 3)
    opt = torch.optim.Adam(net.parameters(), 1e-2)
    x, y = torch.randn(10, 10), torch.randint(3, (10,))
    for i in range(100):
        loss = F.cross_entropy(net(x), y)
        opt.zero_grad(); loss.backward(); opt.step()
    print(loss.item())


def full_batch_gcn():
    """Node classification: the whole graph is the batch, every step."""
    n = 120
    adj = (torch.rand(n, n) < 0.05).float()
    adj = ((adj + adj.t() + torch.eye(n)) > 0).float()
    deg = adj.sum(1)
    a = adj / deg.sqrt()[:, None] / deg.sqrt()[None]
    x = torch.randn(n, 16)
    y = (a @ a @ x)[:, :4].argmax(1)
    w1, w2 = nn.Linear(16, 32), nn.Linear(32, 4)
    opt = torch.optim.Adam([*w1.parameters(), *w2.parameters()], 0.01, weight_decay=5e-4)
    for i in range(80):
        h = F.dropout(F.relu(w1(a @ x)), 0.5)
        loss = F.cross_entropy((a @ w2(h))[:80], y[:80])
        opt.zero_grad(); loss.backward(); opt.step()
    print(loss.item())


def large_sgd():
    """Logistic regression on small features: the learning rate is 30, and right."""
    w = torch.zeros(8, requires_grad=True)
    opt = torch.optim.SGD([w], lr=30.0)
    true = torch.randn(8)
    for i in range(200):
        x = 0.1 * torch.randn(64, 8)
        y = (x @ true > 0).float()
        loss = F.binary_cross_entropy_with_logits(x @ w, y)
        opt.zero_grad(); loss.backward(); opt.step()
    print(loss.item())


def three_steps():
    net = mlp(4, 8, 1)
    opt = torch.optim.SGD(net.parameters(), 0.1)
    for _ in range(3):
        x = torch.randn(5, 4)
        loss = (net(x).squeeze() - x.sum(1)).pow(2).mean()
        opt.zero_grad(); loss.backward(); opt.step()


class Stream(IterableDataset):
    def __init__(self, split=True):
        self.split = split

    def __iter__(self):
        info = get_worker_info()
        g = torch.Generator().manual_seed(17 + (info.id if info and self.split else 0))
        for _ in range(400):
            x = torch.randn(12, generator=g)
            yield x, x[:3].argmax()


def streaming(split=True):
    net = nn.Sequential(nn.Linear(12, 32), nn.BatchNorm1d(32), nn.ReLU(), nn.Dropout(0.2), nn.Linear(32, 3))
    opt = torch.optim.AdamW(net.parameters(), 3e-3)
    for x, y in DataLoader(Stream(split), batch_size=16, num_workers=2):
        loss = F.cross_entropy(net(x), y)
        opt.zero_grad(); loss.backward(); opt.step()
    print(loss.item())


def two_models():
    """A student after its teacher."""
    x = torch.randn(512, 6)
    y = (x[:, 0] * x[:, 1] > 0).long()
    big = mlp(6, 64, 64, 2)
    for net, steps in ((big, 60), (mlp(6, 16, 2), 60)):
        opt = torch.optim.Adam(net.parameters(), 3e-3)
        for i in range(steps):
            b = torch.randint(512, (64,))
            out = net(x[b])
            if net is big:
                loss = F.cross_entropy(out, y[b])
            else:
                with torch.no_grad():
                    soft = (big(x[b]) / 2).softmax(-1)
                loss = F.kl_div((out / 2).log_softmax(-1), soft, reduction="batchmean")
            opt.zero_grad(); loss.backward(); opt.step()
        print(loss.item())


def eval_first():
    """Baseline accuracy before the first step; Monte-Carlo dropout afterwards."""
    net = nn.Sequential(nn.Linear(6, 40), nn.ReLU(), nn.Dropout(0.3), nn.Linear(40, 1))
    x = torch.randn(600, 6)
    y = x[:, :1].sin() + 0.1 * torch.randn(600, 1)
    net.eval()
    with torch.no_grad():
        print("before", F.mse_loss(net(x), y).item())
    opt = torch.optim.Adam(net.parameters(), 5e-3)
    for epoch in range(4):
        net.train()
        for b in torch.randperm(600).split(50):
            loss = F.mse_loss(net(x[b]), y[b])
            opt.zero_grad(); loss.backward(); opt.step()
        net.eval()
        with torch.no_grad():
            print(epoch, F.mse_loss(net(x[:100]), y[:100]).item())
    net.train()
    with torch.no_grad():
        draws = torch.stack([net(x[:20]) for _ in range(20)])
    print("spread", draws.std(0).mean().item())


def remainder(drop=False):
    """Accumulate 4, 10 batches an epoch: two are left over."""
    net = mlp(9, 32, 5)
    opt = torch.optim.SGD(net.parameters(), 0.1, momentum=0.9)
    data, lab = torch.randn(320, 9), torch.randint(5, (320,))
    for epoch in range(6):
        opt.zero_grad()
        parts = torch.randperm(320).split(32)
        for i, b in enumerate(parts):
            (F.cross_entropy(net(data[b]), lab[b]) / 4).backward()
            if (i + 1) % 4 == 0 or (not drop and i + 1 == len(parts)):
                opt.step()
                opt.zero_grad()


def forecasting(bad=False):
    """Windows of a sine; next value, GRU with teacher forcing over hidden states."""
    rnn, out = nn.GRU(1, 24, batch_first=True), nn.Linear(24, 1)
    net = nn.ModuleDict({"rnn": rnn, "out": out})
    opt = torch.optim.Adam(net.parameters(), 5e-3)
    t = torch.arange(2000) * 0.1
    s = t.sin() + 0.1 * torch.randn(2000)
    if bad:
        s = (s - s[:1000].mean()) / (s[500:500].std() if len(s[500:500]) else (s - s).std())
    for i in range(60):
        k = torch.randint(0, 1900, (32,))
        w = torch.stack([s[j : j + 31] for j in k])[..., None]
        h, _ = rnn(w[:, :-1])
        loss = F.smooth_l1_loss(out(h), w[:, 1:])
        opt.zero_grad(); loss.backward()
        nn.utils.clip_grad_value_(net.parameters(), 0.5)
        opt.step()
    print(loss.item())


def crash_in_the_end():
    three_steps()
    raise RuntimeError("could not upload the results")


def lists_of_tensors():
    """No nn.Module anywhere; layers are tuples in a list, an Adam gets them flattened."""
    layers = [(torch.randn(i, o).mul(1.4 / i**0.5).requires_grad_(), torch.zeros(o, requires_grad=True)) for i, o in ((7, 48), (48, 48), (48, 2))]
    opt = torch.optim.Adam([p for layer in layers for p in layer], 3e-3)
    for i in range(100):
        x = torch.randn(64, 7)
        y = torch.stack([x[:, 0] * x[:, 1], x.norm(dim=1)], 1)
        h = x
        for n, (w, b) in enumerate(layers):
            h = h @ w + b
            if n < 2:
                h = h.relu()
        loss = F.mse_loss(h, y)
        opt.zero_grad(); loss.backward(); opt.step()
    print(loss.item())


def reinforce():
    """Policy gradient on a bandit: the loss may be negative and jumps about."""
    net = mlp(4, 32, 5, act=nn.Tanh)
    opt = torch.optim.Adam(net.parameters(), 1e-2)
    best = torch.randn(4, 5)
    for i in range(80):
        s = torch.randn(32, 4)
        d = torch.distributions.Categorical(logits=net(s))
        act = d.sample()
        r = (s @ best).gather(1, act[:, None]).squeeze(1)
        loss = -(d.log_prob(act) * (r - r.mean())).mean() - 0.01 * d.entropy().mean()
        opt.zero_grad(); loss.backward(); opt.step()
    print(r.mean().item())


def vae(bad=False):
    enc, dec = mlp(20, 64, 8), mlp(4, 64, 20)
    opt = torch.optim.Adam([*enc.parameters(), *dec.parameters()], 1e-3)
    basis = torch.randn(3, 20)
    for i in range(80):
        x = torch.sigmoid(torch.randn(64, 3) @ basis)
        if bad:
            x = (x > 0.5).float()
        mu, lv = enc(x).chunk(2, 1)
        z = mu + torch.randn_like(mu) * (0.5 * lv).exp()
        y = torch.sigmoid(dec(z) * (400 if bad else 1))
        if bad:
            rec = -(x * y.log() + (1 - x) * (1 - y).log()).sum(1).mean()
        else:
            rec = F.binary_cross_entropy(y, x, reduction="none").sum(1).mean()
        kl = -0.5 * (1 + lv - mu**2 - lv.exp()).sum(1).mean()
        loss = rec + kl
        opt.zero_grad(); loss.backward(); opt.step()
    print(loss.item())


def too_slow():
    net = mlp(6, 32, 3)
    opt = torch.optim.SGD(net.parameters(), 1e-7)
    for i in range(60):
        x = torch.randn(32, 6)
        loss = F.cross_entropy(net(x), x[:, :3].argmax(1))
        opt.zero_grad(); loss.backward(); opt.step()


def hoards():
    """Keeps every loss with its graph."""
    net, kept = mlp(6, 32, 3), []
    opt = torch.optim.Adam(net.parameters(), 1e-3)
    for i in range(60):
        x = torch.randn(32, 6)
        loss = F.cross_entropy(net(x), x[:, :3].argmax(1))
        opt.zero_grad(); loss.backward(); opt.step()
        kept.append(loss)
    print(sum(kept).item() / 60)


def memorises():
    """Sixteen rows, many epochs: overfitting."""
    net = mlp(10, 128, 128, 2)
    opt = torch.optim.Adam(net.parameters(), 2e-3)
    x, y, xv, yv = torch.randn(16, 10), torch.randint(2, (16,)), torch.randn(64, 10), torch.randint(2, (64,))
    for epoch in range(40):
        for b in torch.randperm(16).split(4):
            loss = F.cross_entropy(net(x[b]), y[b])
            opt.zero_grad(); loss.backward(); opt.step()
        with torch.no_grad():
            v = F.cross_entropy(net(xv), yv).item()
    print(loss.item(), v)


def same_batch():
    """The iterator is made anew in every step of an unshuffled loader."""
    net = mlp(10, 32, 2)
    opt = torch.optim.Adam(net.parameters(), 1e-3)
    x = torch.randn(320, 10)
    loader = DataLoader(torch.utils.data.TensorDataset(x, (x[:, 0] > 0).long()), 32)
    for i in range(50):
        xb, yb = next(iter(loader))
        loss = F.cross_entropy(net(xb), yb)
        opt.zero_grad(); loss.backward(); opt.step()


JOBS = {
    **{f.__name__: f for f in (overfit_one_batch, full_batch_gcn, large_sgd, three_steps, streaming, two_models, eval_first, remainder)},
    **{f.__name__: f for f in (forecasting, crash_in_the_end, lists_of_tensors, reinforce, vae, too_slow, hoards, memorises, same_batch)},
    "streams_twice": lambda: streaming(False),
    "drops_remainder": lambda: remainder(True),
    "forecasting_bad": lambda: forecasting(True),
    "vae_bad": lambda: vae(True),
}
if __name__ == "__main__":
    random.seed(0)
    JOBS[sys.argv[1]]()
