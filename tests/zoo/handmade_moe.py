import torch, torch.nn as nn, torch.nn.functional as F, os
torch.set_num_threads(1); torch.manual_seed(21)
BUG = os.environ.get("MOE_BUG", "") or (__import__("sys").argv + [""])[1]


class Expert(nn.Module):
    def __init__(self, d):
        super().__init__()
        self.up, self.down = nn.Linear(d, 2 * d), nn.Linear(2 * d, d)

    def forward(self, x):
        return self.down(torch.relu(self.up(x)))


class Router(nn.Module):
    def __init__(self, d, n, k=2):
        super().__init__()
        self.gate = nn.Linear(d, n, bias=False)
        self.experts = nn.ModuleList(Expert(d) for _ in range(n))
        self.k, self.aux = k, None

    def forward(self, x):
        flat = x.reshape(-1, x.shape[-1])
        p = self.gate(flat).softmax(-1)
        if BUG == "detachedgate":
            p = p.detach()
        w, idx = p.topk(self.k, -1)
        w = w / w.sum(-1, keepdim=True)
        y = torch.zeros_like(flat)
        for e, ex in enumerate(self.experts):
            row, slot = (idx == e).nonzero(as_tuple=True)
            if len(row):
                y = y.index_add(0, row, w[row, slot, None] * ex(flat[row]))
        load = F.one_hot(idx, p.shape[-1]).float().mean((0, 1))
        self.aux = (load * p.mean(0)).sum() * p.shape[-1]
        return y.view_as(x)


class Blk(nn.Module):
    def __init__(self, d):
        super().__init__()
        self.n1, self.n2 = nn.LayerNorm(d), nn.LayerNorm(d)
        self.at = nn.MultiheadAttention(d, 4, batch_first=True)
        self.moe = Router(d, 6)

    def forward(self, x, m):
        h = self.n1(x)
        x = x + self.at(h, h, h, attn_mask=m, need_weights=False)[0]
        return x + self.moe(self.n2(x))


class MoELM(nn.Module):
    def __init__(self, v=64, d=32, t=20):
        super().__init__()
        self.tok, self.pos = nn.Embedding(v, d), nn.Parameter(torch.zeros(t, d))
        self.blocks = nn.ModuleList(Blk(d) for _ in range(2))
        self.norm, self.out = nn.LayerNorm(d), nn.Linear(d, v, bias=False)
        self.out.weight = self.tok.weight
        self.apply(lambda m: nn.init.normal_(m.weight, std=0.05) if isinstance(m, (nn.Linear, nn.Embedding)) else None)

    def forward(self, ids):
        t = ids.shape[1]
        m = torch.full((t, t), float("-inf")).triu(1)
        if BUG == "lower":
            m = torch.full((t, t), float("-inf")).tril(-1)
        x = self.tok(ids) + self.pos[:t]
        for b in self.blocks:
            x = b(x, m)
        return self.out(self.norm(x)), sum(b.moe.aux for b in self.blocks)


model = MoELM()
opt = torch.optim.Adam(model.parameters(), lr=1e-3)
for i in range(50):
    start = torch.randint(0, 64, (12, 1)); stride = torch.randint(1, 5, (12, 1))
    s = (start + stride * torch.arange(21)) % 64
    lg, aux = model(s[:, :-1])
    ce = F.cross_entropy(lg.reshape(-1, 64), s[:, 1:].reshape(-1))
    z = torch.logsumexp(lg, -1).pow(2).mean()
    loss = ce + 0.01 * aux + 1e-4 * z
    opt.zero_grad(); loss.backward(); opt.step()
    if i % 10 == 0: print(i, ce.item(), aux.item())
