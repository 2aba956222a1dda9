import sys
import warnings

import lightning as L
import torch
from torch import nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset

warnings.filterwarnings("ignore")
torch.set_num_threads(1)
L.seed_everything(0, verbose=False)
what = sys.argv[1] if len(sys.argv) > 1 else "vae"


class VAE(L.LightningModule):
    def __init__(self):
        super().__init__()
        self.enc = nn.Sequential(nn.Linear(20, 64), nn.SiLU(), nn.Linear(64, 16))
        self.dec = nn.Sequential(nn.Linear(8, 64), nn.SiLU(), nn.Linear(64, 20))

    def training_step(self, batch, i):
        (x,) = batch
        mu, logvar = self.enc(x).chunk(2, -1)
        z = mu + torch.randn_like(mu) * (0.5 * logvar).exp()
        if what == "nosample":
            z = torch.tensor(z.tolist())
        rec = F.mse_loss(self.dec(z), x, reduction="sum") / len(x)
        kl = -0.5 * (1 + logvar - mu**2 - logvar.exp()).sum(-1).mean()
        if what == "nosample":
            kl = kl.detach()
        if what == "bigkl":
            kl = kl + (40 * mu).exp().exp().mean()
        return rec + 0.1 * kl

    def configure_optimizers(self):
        return torch.optim.Adam(self.parameters(), 1e-3)


class GAN(L.LightningModule):
    automatic_optimization = False

    def __init__(self):
        super().__init__()
        self.g = nn.Sequential(nn.Linear(8, 32), nn.LeakyReLU(0.2), nn.Linear(32, 20))
        self.d = nn.Sequential(nn.Linear(20, 32), nn.LeakyReLU(0.2), nn.Linear(32, 1))

    def training_step(self, batch, i):
        (x,) = batch
        og, od = self.optimizers()
        fake = self.g(torch.randn(len(x), 8))
        self.toggle_optimizer(od)
        real_term = F.binary_cross_entropy_with_logits(self.d(x), torch.ones(len(x), 1))
        fake_term = F.binary_cross_entropy_with_logits(self.d(fake.detach()), torch.zeros(len(x), 1))
        od.zero_grad()
        self.manual_backward(real_term)
        self.manual_backward(fake_term)
        od.step()
        self.untoggle_optimizer(od)
        self.toggle_optimizer(og)
        og.zero_grad()
        judged = self.d(fake)
        self.manual_backward(F.binary_cross_entropy_with_logits(judged, torch.ones(len(x), 1)))
        og.step()
        self.untoggle_optimizer(og)

    def configure_optimizers(self):
        return torch.optim.Adam(self.g.parameters(), 2e-4, betas=(0.5, 0.999)), torch.optim.Adam(
            self.d.parameters(), 2e-4, betas=(0.5, 0.999)
        )


data = torch.randn(800, 4) @ torch.randn(4, 20) * 0.5
model = GAN() if "gan" in what else VAE()
if what == "swa":
    extra = [L.pytorch.callbacks.StochasticWeightAveraging(1e-3, swa_epoch_start=1, annealing_epochs=1)]
else:
    extra = []
L.Trainer(
    max_epochs=4,
    accelerator="cpu",
    logger=False,
    enable_checkpointing=False,
    enable_progress_bar=False,
    enable_model_summary=False,
    callbacks=extra,
).fit(model, DataLoader(TensorDataset(data), 40, shuffle=True))
