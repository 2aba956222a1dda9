import argparse, os, tempfile, warnings
from pathlib import Path
import lightning as L
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

warnings.filterwarnings("ignore")
torch.set_num_threads(1)


class CharTransformer(L.LightningModule):
    def __init__(self, vocab, ctx, dim=48, heads=4, depth=2, lr=2e-3, oops=""):
        super().__init__()
        self.save_hyperparameters()
        self.tok, self.pos = nn.Embedding(vocab, dim), nn.Parameter(torch.randn(ctx, dim) * 0.02)
        layer = nn.TransformerEncoderLayer(dim, heads, 2 * dim, dropout=0.1, batch_first=True, norm_first=True)
        self.body = nn.TransformerEncoder(layer, depth, enable_nested_tensor=False)
        self.final = nn.LayerNorm(dim)
        self.head = nn.Linear(dim, vocab, bias=False)

    def forward(self, x):
        mask = nn.Transformer.generate_square_subsequent_mask(x.size(1), device=x.device)
        if self.hparams.oops == "nomask":
            mask = None
        h = self.tok(x) + self.pos[: x.size(1)]
        if self.hparams.oops == "detach":
            h = h.detach()
        return self.head(self.final(self.body(h, mask=mask)))

    def _loss(self, batch):
        (x,) = batch
        if self.hparams.oops == "samepos":
            return nn.functional.cross_entropy(self(x).transpose(1, 2), x)
        return nn.functional.cross_entropy(self(x[:, :-1]).transpose(1, 2), x[:, 1:])

    def training_step(self, batch, i):
        loss = self._loss(batch)
        self.log("train/loss", loss)
        if self.hparams.oops == "nanlater" and i == 20:
            loss = loss * (loss.detach() - loss.detach()) / (loss.detach() - loss.detach())
        return loss

    def validation_step(self, batch, i):
        if self.hparams.oops == "trainval":
            self.train()
        self.log("val/loss", self._loss(batch), prog_bar=True)

    def configure_optimizers(self):
        given = self.body.parameters() if self.hparams.oops == "partial" else self.parameters()
        opt = torch.optim.AdamW(given, lr=self.hparams.lr)
        sched = torch.optim.lr_scheduler.OneCycleLR(opt, self.hparams.lr, total_steps=max(self.trainer.estimated_stepping_batches, 2))
        return [opt], [{"scheduler": sched, "interval": "step"}]


def main():
    p = argparse.ArgumentParser()
    p.add_argument("--accumulate", type=int, default=1)
    p.add_argument("--clip", type=float, default=None)
    p.add_argument("--precision", default="32-true")
    p.add_argument("--lr", type=float, default=2e-3)
    p.add_argument("--oops", default="")
    p.add_argument("--epochs", type=int, default=2)
    a = p.parse_args()
    L.seed_everything(4, verbose=False)
    text = (Path(__file__).resolve().parents[2] / "examples" / "data" / "tinyshakespeare.txt").read_text()[:12_000]
    chars = sorted(set(text))
    ids = torch.tensor([chars.index(c) for c in text])
    rows = ids[: len(ids) // 33 * 33].view(-1, 33)
    train, val = TensorDataset(rows[:300]), TensorDataset(rows[300:340])
    model = CharTransformer(len(chars), 40, lr=a.lr, oops=a.oops)
    if a.oops == "eval":
        model.eval()
    with tempfile.TemporaryDirectory() as d:
        t = L.Trainer(
            max_epochs=a.epochs,
            accelerator="cpu",
            accumulate_grad_batches=a.accumulate,
            gradient_clip_val=a.clip,
            precision=a.precision,
            logger=False,
            enable_checkpointing=False,
            enable_progress_bar=False,
            enable_model_summary=False,
            default_root_dir=d,
        )
        t.fit(model, DataLoader(train, 12, shuffle=True), DataLoader(val, 12))
    print({k: round(float(v), 3) for k, v in t.callback_metrics.items()})


if __name__ == "__main__":
    main()
