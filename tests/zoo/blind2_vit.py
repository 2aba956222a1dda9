"""A vision transformer on drawn digits-like shapes with Lightning: EMA of the weights, mixed labels, best checkpoint."""

import argparse
import logging
import tempfile
import warnings

import lightning as L
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

warnings.filterwarnings("ignore")
logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
p = argparse.ArgumentParser()
p.add_argument("--break", dest="broken", default="")
p = p.parse_args()
L.seed_everything(9, verbose=False)
torch.set_num_threads(1)


def shapes(n):
    images, labels = torch.randn(n, 1, 16, 16) * 0.3, torch.randint(4, (n,))
    for i, kind in enumerate(labels.tolist()):
        r, c = torch.randint(2, 9, (2,)).tolist()
        if kind == 0:
            images[i, 0, r : r + 5, c : c + 5] += 1.5
        elif kind == 1:
            images[i, 0, r : r + 5, c] += 2
        elif kind == 2:
            images[i, 0, r, c : c + 5] += 2
        else:
            images[i, 0, range(r, r + 5), range(c, c + 5)] += 2
    return TensorDataset(images, labels)


class PatchEmbed(nn.Module):
    def __init__(self, dim):
        super().__init__()
        self.proj = nn.Conv2d(1, dim, 4, 4)

    def forward(self, x):
        x = self.proj(x)
        if p.broken == "view":
            b, c, h, w = x.shape
            return x.flatten(2).permute(2, 0, 1).contiguous().view(b, h * w, c)
        return x.flatten(2).transpose(1, 2)


class ViT(L.LightningModule):
    def __init__(self, dim=48):
        super().__init__()
        self.patch = PatchEmbed(dim)
        self.cls = nn.Parameter(torch.zeros(1, 1, dim))
        self.pos = nn.Parameter(torch.randn(1, 17, dim) * 0.02)
        self.blocks = nn.TransformerEncoder(
            nn.TransformerEncoderLayer(dim, 4, 96, 0.1, "gelu", batch_first=True, norm_first=True), 2, enable_nested_tensor=False
        )
        self.norm, self.head = nn.LayerNorm(dim), nn.Linear(dim, 4)
        self.average = torch.optim.swa_utils.AveragedModel(self.head, multi_avg_fn=torch.optim.swa_utils.get_ema_multi_avg_fn(0.95))

    def forward(self, x):
        x = self.patch(x)
        x = torch.cat([self.cls.expand(len(x), -1, -1), x], 1) + self.pos
        return self.norm(self.blocks(x))[:, 0]

    def training_step(self, batch, _):
        x, y = batch
        lam = float(torch.distributions.Beta(0.4, 0.4).sample())
        other = torch.randperm(len(x))
        out = self.head(self(lam * x + (1 - lam) * x[other]))
        loss = lam * nn.functional.cross_entropy(out, y) + (1 - lam) * nn.functional.cross_entropy(out, y[other])
        self.log("train_loss", loss)
        return loss

    def on_train_batch_end(self, *_):
        self.average.update_parameters(self.head)

    def validation_step(self, batch, _):
        x, y = batch
        out = self.average(self(x))
        self.log("val_loss", nn.functional.cross_entropy(out, y))
        self.log("val_acc", (out.argmax(-1) == y).float().mean())

    def configure_optimizers(self):
        mine = [q for n, q in self.named_parameters() if not n.startswith("average")]
        opt = torch.optim.AdamW(mine, lr=1.5e-3)
        return {"optimizer": opt, "lr_scheduler": torch.optim.lr_scheduler.CosineAnnealingLR(opt, 4)}


size = 4 if p.broken == "tiny_batch" else 32
train, val = DataLoader(shapes(size * 30), size, shuffle=True), DataLoader(shapes(128), 64)
with tempfile.TemporaryDirectory() as root:
    keep = L.pytorch.callbacks.ModelCheckpoint(root, monitor="val_loss")
    trainer = L.Trainer(
        max_epochs=4,
        accelerator="cpu",
        logger=False,
        callbacks=[keep],
        enable_progress_bar=False,
        enable_model_summary=False,
        default_root_dir=root,
    )
    model = ViT()
    trainer.fit(model, train, val)
    print(trainer.validate(model, val, ckpt_path="best", verbose=False, weights_only=False))
