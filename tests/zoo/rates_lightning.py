"""A Lightning module whose scheduler is stepped by Lightning: every epoch unless it is told otherwise."""

import argparse
import warnings

import lightning as L
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

warnings.filterwarnings("ignore")
ap = argparse.ArgumentParser()
ap.add_argument("--interval", default="step")
ap.add_argument("--plan", default="steps")
args = ap.parse_args()
L.seed_everything(1)


class Parity(L.LightningModule):
    def __init__(self):
        super().__init__()
        self.tokens = nn.Embedding(10, 24)
        self.mix = nn.GRU(24, 24, batch_first=True)
        self.answer = nn.Linear(24, 10)

    def training_step(self, batch, _):
        ids, answer = batch
        loss = F.cross_entropy(self.answer(self.mix(self.tokens(ids))[0][:, -1]), answer)
        self.log("loss", loss)
        return loss

    def configure_optimizers(self):
        optimizer = torch.optim.AdamW(self.parameters(), lr=5e-3)
        total = self.trainer.estimated_stepping_batches if args.plan == "steps" else self.trainer.max_epochs
        schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, int(total))
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": args.interval}}


ids = torch.randint(0, 10, (320, 8))
data = DataLoader(TensorDataset(ids, ids.max(1).values), batch_size=16, shuffle=True)
off = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False, "enable_model_summary": False}
L.Trainer(max_epochs=5, accelerator="cpu", **off).fit(Parity(), data)
