"""fp16 autocast with a GradScaler on CPU: a small text classifier."""
import torch, sys
import torch.nn as nn

torch.manual_seed(0); torch.set_num_threads(1)
fault = dict(a.split("=") for a in sys.argv[1:]).get("fault", "")


class Enc(nn.Module):
    def __init__(self, V=200, D=32, C=5):
        super().__init__()
        self.e = nn.Embedding(V, D, padding_idx=0)
        self.layers = nn.ModuleList([nn.TransformerEncoderLayer(D, 4, 64, dropout=0.0, batch_first=True, norm_first=True) for _ in range(2)])
        self.out = nn.Linear(D, C)

    def forward(self, tok):
        mask = tok == 0
        x = self.e(tok)
        for l in self.layers:
            x = l(x, src_key_padding_mask=None if fault == "nopadmask" else mask)
        if fault == "poolall":
            return self.out(x.mean(1))
        keep = (~mask).unsqueeze(-1).float()
        pooled = (x * keep).sum(1) / keep.sum(1)
        if fault == "overflow":
            h = pooled.half() * 300.0
            pooled = (h * h).float() * 1e-3
        return self.out(pooled)


def batches(n):
    g = torch.Generator().manual_seed(1)
    for _ in range(n):
        lens = torch.randint(5, 20, (16,), generator=g)
        t = torch.zeros(16, 20, dtype=torch.long)
        y = torch.randint(0, 5, (16,), generator=g)
        for r, L in enumerate(lens):
            t[r, :L] = torch.randint(1, 200, (int(L),), generator=g)
            t[r, 0] = y[r] + 1
        yield t, y


net = Enc()
opt = torch.optim.Adam(net.parameters(), lr=2e-3)
scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10, growth_interval=1000)
crit = nn.CrossEntropyLoss()
for i, (x, y) in enumerate(batches(60)):
    opt.zero_grad()
    with torch.autocast("cpu", dtype=torch.float16):
        loss = crit(net(x).float(), y)
    scaler.scale(loss).backward()
    if fault == "clipfirst":
        nn.utils.clip_grad_norm_(net.parameters(), 1.0)
        scaler.step(opt)
    else:
        scaler.unscale_(opt)
        nn.utils.clip_grad_norm_(net.parameters(), 1.0)
        scaler.step(opt)
    scaler.update()
    if i % 20 == 0:
        print(i, float(loss), scaler.get_scale())
