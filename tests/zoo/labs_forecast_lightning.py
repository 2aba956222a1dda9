"""Sensor forecasting with Lightning: instance normalisation, patches, a transformer encoder, readings that are missing."""

import argparse
import logging
import math
import warnings

import lightning as L
import torch
from torch import nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, Dataset

PAST, AHEAD = 48, 12


class Sensors(Dataset):
    def __init__(self, count, args, seed=0):
        self.args, self.count = args, count
        gen = torch.Generator().manual_seed(seed)
        length = PAST + AHEAD
        t = torch.arange(length).float()
        period = 8 + 16 * torch.rand(count, 1, generator=gen)
        phase = 6.28 * torch.rand(count, 1, generator=gen)
        self.series = torch.sin(t / period * 2 * math.pi + phase) * (0.5 + torch.rand(count, 1, generator=gen))
        self.series = self.series + 0.05 * torch.randn(count, length, generator=gen)
        if args.case == "harder":
            late = torch.arange(count)[:, None] >= count // 2
            self.series = torch.where(late, self.series + 0.7 * torch.randn(count, length, generator=gen), self.series)
        if args.case in ("gaps", "gapsmasked"):
            lost = torch.rand(count, AHEAD, generator=gen) < 0.02
            lost[:120] = False
            self.series[:, PAST:] = self.series[:, PAST:].masked_fill(lost, float("nan"))
        if args.case in ("flat", "flatsafe"):
            self.series[301, :PAST] = 1.0
        if args.case == "mape":
            self.series = self.series.relu()
        if args.case == "outlier":
            self.series[640 : 640 + 16, PAST:] *= 3e3

    def __len__(self):
        return self.count

    def __getitem__(self, i):
        return {"past": self.series[i, :PAST], "future": self.series[i, PAST:]}


class Forecaster(L.LightningModule):
    def __init__(self, args, dim=32):
        super().__init__()
        self.args = args
        self.embed = nn.Linear(8, dim)
        self.pos = nn.Parameter(torch.randn(PAST // 8, dim) * 0.02)
        layer = nn.TransformerEncoderLayer(dim, 4, 64, 0.0, batch_first=True, norm_first=True)
        self.encoder = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)
        self.head = nn.Linear(dim * (PAST // 8), AHEAD)

    def forward(self, past):
        mean = past.mean(1, keepdim=True)
        if self.args.case == "flat":
            std = past.std(1, keepdim=True, correction=0)
        else:
            std = torch.sqrt(past.var(1, keepdim=True, correction=0) + 1e-5)
        x = ((past - mean) / std).unflatten(1, (-1, 8))
        x = self.encoder(self.embed(x) + self.pos)
        return self.head(x.flatten(1)) * std + mean

    def loss(self, guess, future):
        if self.args.case == "mape":
            return ((guess - future) / future).abs().mean()
        if self.args.case == "gapsmasked":
            known = ~future.isnan()
            return (F.mse_loss(guess, future.nan_to_num(), reduction="none") * known).sum() / known.sum()
        return F.mse_loss(guess, future)

    def training_step(self, batch, index):
        loss = self.loss(self(batch["past"]), batch["future"])
        self.log("train_loss", loss, prog_bar=False)
        return loss

    def validation_step(self, batch, index):
        self.log("val_loss", F.mse_loss(self(batch["past"]), batch["future"].nan_to_num()))

    def configure_optimizers(self):
        opt = torch.optim.AdamW(self.parameters(), lr=2e-3)
        return {"optimizer": opt, "lr_scheduler": {"scheduler": torch.optim.lr_scheduler.CosineAnnealingLR(opt, 90), "interval": "step"}}


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("--case", default="none")
    args = parser.parse_args()
    warnings.filterwarnings("ignore")
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    L.seed_everything(2, verbose=False)
    torch.set_num_threads(1)
    shuffle = args.case not in ("harder", "outlier", "gaps")
    train = DataLoader(Sensors(16 * 60, args), 16, shuffle=shuffle)
    calm = argparse.Namespace(case="none")
    valid = DataLoader(Sensors(64, calm, seed=9), 32)
    trainer = L.Trainer(
        max_steps=90, accelerator="cpu", logger=False, enable_checkpointing=False, enable_progress_bar=False,
        enable_model_summary=False, gradient_clip_val=1.0 if args.case != "outlier" else None, num_sanity_val_steps=0,
    )  # fmt: skip
    model = Forecaster(args)
    trainer.fit(model, train, valid)
    print({k: round(v.item(), 4) for k, v in trainer.callback_metrics.items()})


if __name__ == "__main__":
    main()
