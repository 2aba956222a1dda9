# Sequence to sequence with nn.Transformer, following "Attention is all you need": post-norm, Noam schedule.
import sys, math
import torch, torch.nn as nn

opts = dict(a.split("=") for a in sys.argv[1:])
STEPS, D, LAYERS = int(opts.get("steps", 150)), 48, int(opts.get("layers", 3))
PRE = opts.get("norm") == "pre"
torch.manual_seed(0)
VOCAB, LEN, BOS = 16, 7, 1


class PositionalEncoding(nn.Module):
    def __init__(self):
        super().__init__()
        pos = torch.arange(50).unsqueeze(1)
        div = torch.exp(torch.arange(0, D, 2) * (-math.log(10000.0) / D))
        pe = torch.zeros(50, D)
        pe[:, 0::2], pe[:, 1::2] = torch.sin(pos * div), torch.cos(pos * div)
        self.register_buffer("pe", pe)

    def forward(self, x):
        return x + self.pe[: x.size(1)]


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.src, self.tgt, self.pos = nn.Embedding(VOCAB, D), nn.Embedding(VOCAB, D), PositionalEncoding()
        self.t = nn.Transformer(D, 4, LAYERS, LAYERS, 96, dropout=0.0, batch_first=True, norm_first=PRE)
        self.out = nn.Linear(D, VOCAB)
        for p in self.parameters():
            if p.dim() > 1:
                nn.init.xavier_uniform_(p)

    def forward(self, s, t):
        m = nn.Transformer.generate_square_subsequent_mask(t.size(1))
        h = self.t(self.pos(self.src(s) * math.sqrt(D)), self.pos(self.tgt(t) * math.sqrt(D)), tgt_mask=m, tgt_is_causal=True)
        return self.out(h)


net = Net()
crit = nn.CrossEntropyLoss(label_smoothing=float(opts.get("smooth", 0.1)))
factor, warmup = float(opts.get("factor", 1.0)), int(opts.get("warmup", 60))
if opts.get("lr"):
    opt = torch.optim.Adam(net.parameters(), lr=float(opts["lr"]), betas=(0.9, 0.98), eps=1e-9)
    sched = None
else:
    opt = torch.optim.Adam(net.parameters(), lr=1.0, betas=(0.9, 0.98), eps=1e-9)
    sched = torch.optim.lr_scheduler.LambdaLR(opt, lambda s: factor * D**-0.5 * min((s + 1) ** -0.5, (s + 1) * warmup**-1.5))
for i in range(STEPS):
    s = torch.randint(3, VOCAB, (32, LEN))
    y = s.flip(1)
    t = torch.cat([torch.full((32, 1), BOS), y[:, :-1]], 1)
    loss = crit(net(s, t).reshape(-1, VOCAB), y.reshape(-1))
    opt.zero_grad()
    loss.backward()
    opt.step()
    if sched:
        sched.step()
    if i % 15 == 0:
        print(i, round(loss.item(), 3), opt.param_groups[0]["lr"])
print("end", loss.item())
