import argparse
import warnings

import lightning as L
import numpy as np
import torch
import torch.nn.functional as F
from torch import nn, optim
from torch.utils.data import DataLoader, TensorDataset

warnings.filterwarnings("ignore")
parser = argparse.ArgumentParser()
parser.add_argument("--schedule", default="none")
parser.add_argument("--interval", default="epoch")
parser.add_argument("--lr", type=float, default=2e-3)
parser.add_argument("--epochs", type=int, default=6)
parser.add_argument("--scale", default="unit")
parser.add_argument("--init", default="torch")
parser.add_argument("--output", default="logits")
parser.add_argument("--clip", type=float, default=None)
parser.add_argument("--labels", default="right")
parser.add_argument("--train-size", type=int, default=1280)
args = parser.parse_args()


def gestures(n, seed):
    """Six classes of 3-axis accelerometer strips of 32 samples, in units of 1/1000 g."""
    rng = np.random.default_rng(seed)
    y = rng.integers(0, 6, n)
    t = np.linspace(0, 1, 32)[None, :]
    phase = rng.uniform(0, 2 * np.pi, (n, 1))
    freq = 1.5 + y[:, None] * 0.8 + rng.normal(0, 0.15, (n, 1))
    x = np.stack([np.sin(2 * np.pi * freq * t + phase), np.cos(2 * np.pi * freq * t + phase), 0.4 * t + rng.normal(0, 0.3, (n, 1))], -1)
    x = x + rng.normal(0, 0.5, x.shape)
    return torch.tensor(x, dtype=torch.float32), torch.tensor(y)


class Strips(L.LightningDataModule):
    def setup(self, stage):
        x, y = gestures(args.train_size, 0)
        vx, vy = gestures(400, 1)
        if args.scale == "raw":
            x, vx = x * 1000 + torch.tensor([0.0, 0.0, 981.0]), vx * 1000 + torch.tensor([0.0, 0.0, 981.0])
        if args.labels == "shuffled":
            y = y[torch.randperm(len(y))]
        self.train, self.val = TensorDataset(x, y), TensorDataset(vx, vy)

    def train_dataloader(self):
        return DataLoader(self.train, 32, shuffle=True, drop_last=True)

    def val_dataloader(self):
        return DataLoader(self.val, 100)


class PatchFormer(L.LightningModule):
    def __init__(self, d=48):
        super().__init__()
        self.save_hyperparameters()
        self.patch = nn.Conv1d(3, d, 4, 4)
        self.cls = nn.Parameter(torch.randn(1, 1, d) * 0.02)
        self.pos = nn.Parameter(torch.randn(1, 9, d) * 0.02)
        self.body = nn.TransformerEncoder(nn.TransformerEncoderLayer(d, 4, 96, 0.1, "gelu", batch_first=True, norm_first=True), 2, enable_nested_tensor=False)
        self.head = nn.Sequential(nn.LayerNorm(d), nn.Linear(d, 6))
        if args.init == "ones":
            for m in self.modules():
                if isinstance(m, nn.Linear):
                    nn.init.normal_(m.weight, 0, 1.0)
        elif args.init == "const":
            for m in self.modules():
                if isinstance(m, nn.Linear):
                    nn.init.constant_(m.weight, 0.01), nn.init.zeros_(m.bias)
        elif args.init == "zerohead":
            nn.init.zeros_(self.head[1].weight)

    def forward(self, x):
        h = self.patch(x.transpose(1, 2)).transpose(1, 2)
        h = torch.cat([self.cls.expand(len(x), -1, -1), h], 1) + self.pos
        y = self.head(self.body(h)[:, 0])
        if args.output == "probabilities":
            y = y.softmax(-1)
        return y

    def training_step(self, batch, index):
        x, y = batch
        loss = F.cross_entropy(self(x), y)
        self.log("train_loss", loss, prog_bar=True)
        return loss

    def validation_step(self, batch, index):
        x, y = batch
        out = self(x)
        self.log_dict({"val_loss": F.cross_entropy(out, y), "val_acc": (out.argmax(-1) == y).float().mean()}, prog_bar=True)

    def configure_optimizers(self):
        opt = optim.AdamW(self.parameters(), lr=args.lr, weight_decay=0.01)
        steps = args.epochs * (args.train_size // 32)
        sched = {
            "none": lambda: None,
            "exp": lambda: optim.lr_scheduler.ExponentialLR(opt, 0.8),
            "cosine": lambda: optim.lr_scheduler.CosineAnnealingLR(opt, args.epochs),
            "onecycle": lambda: optim.lr_scheduler.OneCycleLR(opt, args.lr, total_steps=steps),
            "onecycle-long": lambda: optim.lr_scheduler.OneCycleLR(opt, args.lr, total_steps=steps * 32),
            "plateau": lambda: optim.lr_scheduler.ReduceLROnPlateau(opt, patience=1, factor=0.5),
            "warm": lambda: optim.lr_scheduler.CosineAnnealingWarmRestarts(opt, 2),
        }[args.schedule]()
        if sched is None:
            return opt
        return {"optimizer": opt, "lr_scheduler": {"scheduler": sched, "interval": args.interval, "monitor": "val_loss"}}


L.seed_everything(3, verbose=False)
trainer = L.Trainer(max_epochs=args.epochs, accelerator="cpu", logger=False, enable_checkpointing=False, enable_progress_bar=False, enable_model_summary=False,
                    gradient_clip_val=args.clip, num_sanity_val_steps=2)
model = PatchFormer()
trainer.fit(model, datamodule=Strips())
print({k: round(float(v), 4) for k, v in trainer.callback_metrics.items()})
