"""Manual optimization: two optimizers (embedding and the rest), own accumulation."""

import sys, warnings
import pytorch_lightning as pl
import torch
from torch import nn
from torch.utils.data import DataLoader, Dataset

warnings.filterwarnings("ignore")
torch.set_num_threads(1)
pl.seed_everything(2, verbose=False)
FLAW = sys.argv[1] if len(sys.argv) > 1 else None


class Parity(Dataset):
    def __len__(self):
        return 640

    def __getitem__(self, i):
        g = torch.Generator().manual_seed(i)
        x = torch.randint(0, 8, (12,), generator=g)
        return x, (x == 3).sum().clamp(max=4)


class Counter(pl.LightningModule):
    automatic_optimization = False
    every = 2

    def __init__(self):
        super().__init__()
        self.emb = nn.Embedding(8, 32)
        self.gru = nn.GRU(32, 32, batch_first=True)
        self.out = nn.Sequential(nn.Linear(32, 32), nn.ReLU(), nn.Linear(32, 5))

    def forward(self, x):
        return self.out(self.gru(self.emb(x))[0][:, -1])

    def training_step(self, batch, i):
        o1, o2 = self.optimizers()
        loss = nn.functional.cross_entropy(self(batch[0]), batch[1])
        scaled = loss if FLAW == "undivided" else loss / self.every
        if FLAW != "nobackward":
            self.manual_backward(scaled)
        if (i + 1) % self.every == 0:
            self.clip_gradients(o2, gradient_clip_val=1.0, gradient_clip_algorithm="norm")
            if FLAW != "nostep":
                o1.step()
                o2.step()
            if FLAW != "nozero":
                o1.zero_grad()
                o2.zero_grad()

    def configure_optimizers(self):
        rest = [p for n, p in self.named_parameters() if not n.startswith("emb")]
        return torch.optim.SGD(self.emb.parameters(), 0.1), torch.optim.Adam(rest[:-2] if FLAW == "short" else rest, 5e-3)


pl.Trainer(
    max_steps=80 if FLAW != "nostep" else -1,
    max_epochs=2,
    accelerator="cpu",
    logger=False,
    enable_checkpointing=False,
    enable_progress_bar=False,
    enable_model_summary=False,
).fit(Counter(), DataLoader(Parity(), 16, shuffle=True))
