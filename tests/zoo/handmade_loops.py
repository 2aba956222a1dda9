"""Training loops as they are found in the wild: unusual call orders that are right, and a few that are wrong."""
import copy
import sys

import torch
import torch.nn as nn
import torch.nn.functional as F

torch.manual_seed(7)
torch.set_num_threads(1)
X = torch.randn(640, 12)
Y = (X[:, :4] * X[:, 4:8]).argmax(1)


class Net(nn.Module):
    def __init__(self, p=0.2):
        super().__init__()
        self.a, self.b, self.c = nn.Linear(12, 48), nn.Linear(48, 48), nn.Linear(48, 4)
        self.p = p

    def forward(self, x):
        x = F.dropout(F.relu(self.a(x)), self.p, self.training)
        x = F.dropout(F.relu(self.b(x)), self.p, self.training)
        return self.c(x)


def draw(n=32):
    i = torch.randint(640, (n,))
    return X[i], Y[i]


def forward_by_name(kind=""):
    net = Net()
    opt = torch.optim.Adam(net.parameters(), 2e-3)
    for i in range(60):
        x, y = draw()
        loss = F.cross_entropy(net.forward(x), y)
        if kind != "keeps":
            opt.zero_grad()
        loss.backward()
        opt.step()


def two_tasks():
    """Labelled and unlabelled batches, one backward each, one step."""
    net = Net(0.0)
    opt = torch.optim.SGD(net.parameters(), 0.05, momentum=0.9)
    for i in range(60):
        opt.zero_grad()
        x, y = draw()
        sup = F.cross_entropy(net(x), y)
        sup.backward()
        u, v = draw(64)
        flip = F.cross_entropy(net(u + 0.05 * torch.randn_like(u)), v)
        flip.backward()
        opt.step()


def pseudo_labels():
    """Confident guesses on unlabelled rows become labels; the guesser is the model in training."""
    net = Net()
    opt = torch.optim.Adam(net.parameters(), 2e-3)
    for i in range(60):
        x, y = draw()
        u, _ = draw(64)
        with torch.no_grad():
            conf, guess = net(u).softmax(1).max(1)
        keep = (conf > 0.5).float()
        extra = (F.cross_entropy(net(u + 0.1 * torch.randn_like(u)), guess, reduction="none") * keep).mean()
        loss = F.cross_entropy(net(x), y) + 0.5 * extra
        opt.zero_grad()
        loss.backward()
        opt.step()


def adversarial():
    """FGSM: a first backward for the input's gradient only."""
    net = Net(0.0)
    opt = torch.optim.Adam(net.parameters(), 2e-3)
    for i in range(50):
        x, y = draw()
        x.requires_grad_()
        F.cross_entropy(net(x), y).backward()
        adv = (x + 0.05 * x.grad.sign()).detach()
        opt.zero_grad()
        F.cross_entropy(net(adv), y).backward()
        opt.step()


def sharpness_aware():
    """SAM: up along the gradient, gradient there, back, step."""
    net = Net(0.0)
    opt = torch.optim.SGD(net.parameters(), 0.05)
    for i in range(50):
        x, y = draw()
        F.cross_entropy(net(x), y).backward()
        with torch.no_grad():
            norm = torch.stack([p.grad.norm() for p in net.parameters()]).norm()
            shift = [p.grad * (0.05 / (norm + 1e-12)) for p in net.parameters()]
            for p, e in zip(net.parameters(), shift):
                p.add_(e)
        opt.zero_grad()
        F.cross_entropy(net(x), y).backward()
        with torch.no_grad():
            for p, e in zip(net.parameters(), shift):
                p.sub_(e)
        opt.step()
        opt.zero_grad()


def meta():
    """MAML, second order."""
    w = nn.ParameterDict({"w1": nn.Parameter(torch.randn(1, 24) * 0.5), "b1": nn.Parameter(torch.zeros(24)), "w2": nn.Parameter(torch.randn(24, 1) * 0.2)})
    opt = torch.optim.Adam(w.parameters(), 5e-3)
    f = lambda p, x: torch.tanh(x @ p["w1"] + p["b1"]) @ p["w2"]
    for i in range(40):
        total = 0.0
        for _ in range(4):
            k = torch.rand(1) * 3
            x = torch.rand(20, 1) * 6 - 3
            y = torch.sin(x + k)
            inner = F.mse_loss(f(w, x[:10]), y[:10])
            g = torch.autograd.grad(inner, list(w.values()), create_graph=True)
            fast = {n: p - 0.05 * q for (n, p), q in zip(w.items(), g)}
            total = total + F.mse_loss(f(fast, x[10:]), y[10:])
        opt.zero_grad()
        (total / 4).backward()
        opt.step()


def frozen_backbone():
    """Fine-tuning: the backbone is frozen with its batch-norms in eval mode, the head trains with dropout."""
    back = nn.Sequential(nn.Linear(12, 32), nn.BatchNorm1d(32), nn.ReLU(), nn.Linear(32, 32), nn.BatchNorm1d(32), nn.ReLU())
    net = nn.Sequential(back, nn.Dropout(0.1), nn.Linear(32, 4))
    back.requires_grad_(False)
    opt = torch.optim.AdamW([p for p in net.parameters() if p.requires_grad], 3e-3)
    for epoch in range(3):
        net.train()
        back.eval()
        for i in range(20):
            x, y = draw()
            loss = F.cross_entropy(net(x), y)
            opt.zero_grad()
            loss.backward()
            opt.step()
        net.eval()
        with torch.no_grad():
            print((net(X).argmax(1) == Y).float().mean().item())


def evaluate_with_graph(kind="eval"):
    """Validation without no_grad."""
    net = nn.Sequential(nn.Linear(12, 48), nn.ReLU(), nn.Dropout(0.3), nn.Linear(48, 4))
    opt = torch.optim.Adam(net.parameters(), 2e-3)
    for epoch in range(5):
        net.train()
        for i in range(15):
            x, y = draw()
            loss = F.cross_entropy(net(x), y)
            opt.zero_grad()
            loss.backward()
            opt.step()
        if kind == "eval":
            net.eval()
        total = 0.0
        for k in range(0, 128, 32):
            total += F.cross_entropy(net(X[k : k + 32]), Y[k : k + 32]).item()
        print(epoch, total / 4)


def functional_dropout_eval(kind=""):
    net = Net()
    opt = torch.optim.Adam(net.parameters(), 2e-3)
    if kind == "train_in_eval":
        net.eval()
    for epoch in range(4):
        if kind == "":
            net.train()
        for i in range(15):
            x, y = draw()
            loss = F.cross_entropy(net(x), y)
            opt.zero_grad()
            loss.backward()
            opt.step()
        if kind == "":
            net.eval()
        with torch.no_grad():
            print(sum(F.cross_entropy(net(X[k : k + 64]), Y[k : k + 64]).item() for k in range(0, 256, 64)) / 4)


def swapped_model():
    """The optimizer holds the parameters of a copy that is no longer trained."""
    net = Net(0.0)
    opt = torch.optim.Adam(net.parameters(), 1e-3)
    net = copy.deepcopy(net)
    for i in range(40):
        x, y = draw()
        loss = F.cross_entropy(net(x), y)
        net.zero_grad()
        loss.backward()
        opt.step()


def scheduler_only():
    net = Net(0.0)
    opt = torch.optim.SGD(net.parameters(), 0.1)
    sched = torch.optim.lr_scheduler.StepLR(opt, 10)
    for i in range(40):
        x, y = draw()
        opt.zero_grad()
        loss = F.cross_entropy(net(x), y)
        loss.backward()
        sched.step()


def rewrapped_loss():
    """The loss is made anew from its number."""
    net = Net(0.0)
    opt = torch.optim.Adam(net.parameters(), 1e-3)
    for i in range(40):
        x, y = draw()
        loss = torch.tensor(F.cross_entropy(net(x), y).item(), requires_grad=True)
        opt.zero_grad()
        loss.backward()
        opt.step()


def zero_inside():
    """zero_grad within the micro-batch loop: only the last of four counts."""
    net = Net(0.0)
    opt = torch.optim.SGD(net.parameters(), 0.1)
    for i in range(30):
        for k in range(4):
            x, y = draw()
            opt.zero_grad()
            (F.cross_entropy(net(x), y) / 4).backward()
        opt.step()


def nan_labels():
    net = nn.Sequential(nn.Linear(12, 32), nn.Tanh(), nn.Linear(32, 1))
    opt = torch.optim.Adam(net.parameters(), 1e-3)
    target = X.sum(1)
    target[333] = float("nan")
    for i in range(40):
        k = torch.arange(i * 16, i * 16 + 16)
        loss = F.mse_loss(net(X[k]).squeeze(1), target[k])
        opt.zero_grad()
        loss.backward()
        opt.step()


def stepping_in_between():
    """Evaluates and samples between every two steps; keeps the best weights; early stopping."""
    net, best, state = nn.Sequential(nn.Linear(12, 32), nn.Dropout(0.1), nn.ELU(), nn.Linear(32, 4)), 9.0, None
    opt = torch.optim.Adamax(net.parameters(), 4e-3)
    for i in range(60):
        net.train()
        x, y = draw()
        loss = F.cross_entropy(net(x), y)
        opt.zero_grad()
        loss.backward()
        opt.step()
        net.eval()
        with torch.inference_mode():
            v = F.cross_entropy(net(X[:200]), Y[:200]).item()
        if v < best:
            best, state = v, copy.deepcopy(net.state_dict())
    net.load_state_dict(state)


def sparse_rows():
    """Word vectors with sparse gradients, negative sampling."""
    a, b = nn.Embedding(300, 16, sparse=True), nn.Embedding(300, 16, sparse=True)
    opt = torch.optim.SparseAdam([*a.parameters(), *b.parameters()], 5e-3)
    for i in range(60):
        c = torch.randint(300, (64,))
        pos, neg = (c + torch.randint(1, 4, (64,))) % 300, torch.randint(300, (64, 5))
        s = (a(c) * b(pos)).sum(1)
        n = torch.einsum("bd,bkd->bk", a(c), b(neg))
        loss = -(F.logsigmoid(s).mean() + F.logsigmoid(-n).mean())
        opt.zero_grad()
        loss.backward()
        opt.step()


WAYS = {f.__name__: f for f in (two_tasks, pseudo_labels, adversarial, sharpness_aware, meta, frozen_backbone, swapped_model, scheduler_only)}
WAYS |= {f.__name__: f for f in (rewrapped_loss, zero_inside, nan_labels, stepping_in_between, sparse_rows, forward_by_name, evaluate_with_graph)}
WAYS["functional_dropout_eval"] = functional_dropout_eval
WAYS[sys.argv[1]](*sys.argv[2:])
