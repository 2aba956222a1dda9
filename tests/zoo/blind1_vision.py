"""A ViT on drawn shapes: Lightning or accelerate."""
import sys
import tempfile
import logging, warnings

warnings.filterwarnings("ignore")
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.data import DataLoader, Dataset

how = sys.argv[1] if len(sys.argv) > 1 else "lightning"
flags = set(sys.argv[2:])
torch.manual_seed(0)


class Shapes(Dataset):
    """Noisy pictures (1, 16, 16) of a bar, a column, a cross or a box."""

    def __init__(self, n, seed):
        g = torch.Generator().manual_seed(seed)
        self.y = torch.randint(0, 4, (n,), generator=g)
        self.x = 40 * torch.rand(n, 1, 16, 16, generator=g)
        for i in range(n):
            r, c = torch.randint(3, 13, (2,), generator=g).tolist()
            if self.y[i] in (0, 2):
                self.x[i, 0, r] += 150
            if self.y[i] in (1, 2):
                self.x[i, 0, :, c] += 150
            if self.y[i] == 3:
                self.x[i, 0, r - 3 : r + 3, c - 3 : c + 3] += 150
        if "raw" not in flags:
            self.x = (self.x - 60) / 60

    def __len__(self):
        return len(self.y)

    def __getitem__(self, i):
        return self.x[i], self.y[i]


class Layer(nn.Module):
    def __init__(self, d):
        super().__init__()
        self.n1, self.a, self.n2 = nn.LayerNorm(d), nn.MultiheadAttention(d, 4, batch_first=True), nn.LayerNorm(d)
        self.f = nn.Sequential(nn.Linear(d, 2 * d), nn.ReLU(), nn.Linear(2 * d, d))

    def forward(self, x):
        h = self.n1(x)
        x = x + self.a(h, h, h, need_weights=False)[0]
        return x + self.f(self.n2(x))


class ViT(nn.Module):
    def __init__(self, d=32):
        super().__init__()
        self.patch = nn.Conv2d(1, d, 4, 4)
        self.cls, self.pos = nn.Parameter(torch.zeros(1, 1, d)), nn.Parameter(0.02 * torch.randn(1, 17, d))
        self.layers = nn.Sequential(*[Layer(d) for _ in range(2)])
        self.head = nn.Sequential(nn.LayerNorm(d), nn.Linear(d, 4))
        if "softmax" in flags:
            self.head.append(nn.Softmax(-1))
        if "tanh" in flags:
            self.head.append(nn.Tanh())

    def forward(self, x):
        x = self.patch(x).flatten(2).transpose(1, 2)
        return self.head(self.layers(torch.cat([self.cls.expand(len(x), -1, -1), x], 1) + self.pos)[:, 0])


EPOCHS, LR = 6, 3e-3
train, val = DataLoader(Shapes(640, 0), 32, shuffle=True, drop_last=True), DataLoader(Shapes(128, 1), 64)
steps = EPOCHS * len(train)
if how == "lightning":
    import lightning as L

    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)

    class Lit(L.LightningModule):
        def __init__(self):
            super().__init__()
            self.net = ViT()

        def training_step(self, batch, i):
            loss = F.cross_entropy(self.net(batch[0]), batch[1])
            self.log("loss", loss)
            if i % 10 == 0:
                print(self.global_step, loss.item(), self.optimizers().param_groups[0]["lr"])
            return loss

        def validation_step(self, batch, i):
            print("val", F.cross_entropy(self.net(batch[0]), batch[1]).item())

        def configure_optimizers(self):
            opt = torch.optim.AdamW(self.parameters(), LR)
            sched = torch.optim.lr_scheduler.OneCycleLR(opt, LR, total_steps=steps)
            return [opt], [sched if "per_epoch" in flags else {"scheduler": sched, "interval": "step"}]

    L.Trainer(max_epochs=EPOCHS, logger=False, enable_checkpointing=False, enable_progress_bar=False, enable_model_summary=False,
              accelerator="cpu", num_sanity_val_steps=0, default_root_dir=tempfile.mkdtemp()).fit(Lit(), train, val)
else:
    from accelerate import Accelerator

    acc = Accelerator(cpu=True)
    net = ViT()
    opt = torch.optim.AdamW(net.parameters(), LR)
    sched = torch.optim.lr_scheduler.CosineAnnealingLR(opt, steps // 4 if "short" in flags else steps)
    net, opt, train, val, sched = acc.prepare(net, opt, train, val, sched)
    for epoch in range(EPOCHS):
        net.train()
        for i, (x, y) in enumerate(train):
            loss = F.cross_entropy(net(x), y)
            acc.backward(loss)
            acc.clip_grad_norm_(net.parameters(), 1.0)
            opt.step()
            sched.step()
            opt.zero_grad()
            if i % 10 == 0:
                print(epoch, i, loss.item())
        net.eval()
        with torch.no_grad():
            print("val", sum(F.cross_entropy(net(x), y).item() for x, y in val) / len(val))
