"""A character model in the manner of the small GPT scripts: random crops, both losses estimated every so often."""

import argparse
from pathlib import Path

import torch
import torch.nn as nn
from torch.nn import functional as F

p = argparse.ArgumentParser()
p.add_argument("--steps", type=int, default=240)
p.add_argument("--lr", type=float, default=2e-3)
p.add_argument("--chars", type=int, default=60_000)
p.add_argument("--dropout", type=float, default=0.0)
p.add_argument("--width", type=int, default=48)
p.add_argument("--apart", action="store_true", help="inputs and targets come from different places")
p.add_argument("--noise", action="store_true", help="the corpus is randint")
p.add_argument("--one-batch", action="store_true", help="is the model able to learn one batch by heart?")
a = p.parse_args()
torch.manual_seed(3)
torch.set_num_threads(1)
text = (Path(__file__).parents[2] / "examples/data/tinyshakespeare.txt").read_text()[: 2 * 60_000]
alphabet = sorted(set(text))
data = torch.tensor([alphabet.index(c) for c in text])
if a.noise:
    data = torch.randint(0, len(alphabet), data.shape)
parts = {"train": data[: a.chars], "val": data[60_000:]}
BLOCK, BATCH = 32, 16


def get_batch(split):
    d = parts[split]
    ix = torch.randint(len(d) - BLOCK - 1, (BATCH,))
    iy = torch.randint(len(d) - BLOCK - 1, (BATCH,)) if a.apart else ix
    return torch.stack([d[i : i + BLOCK] for i in ix]), torch.stack([d[i + 1 : i + 1 + BLOCK] for i in iy])


class GPT(nn.Module):
    def __init__(self, width):
        super().__init__()
        self.tok, self.pos = nn.Embedding(len(alphabet), width), nn.Embedding(BLOCK, width)
        self.blocks = nn.ModuleList(
            nn.TransformerEncoderLayer(width, 4, 4 * width, a.dropout, F.gelu, batch_first=True, norm_first=True) for _ in range(2)
        )
        self.norm, self.head = nn.LayerNorm(width), nn.Linear(width, len(alphabet))

    def forward(self, idx, targets=None):
        mask = nn.Transformer.generate_square_subsequent_mask(idx.shape[1])
        h = self.tok(idx) + self.pos(torch.arange(idx.shape[1]))
        for block in self.blocks:
            h = block(h, src_mask=mask, is_causal=True)
        logits = self.head(self.norm(h))
        return logits, None if targets is None else F.cross_entropy(logits.view(-1, logits.size(-1)), targets.reshape(-1))


@torch.no_grad()
def estimate_loss(model):
    model.eval()
    means = {split: sum(model(*get_batch(split))[1].item() for _ in range(6)) / 6 for split in ("train", "val")}
    model.train()
    return means


model = GPT(a.width)
optimizer = torch.optim.AdamW(model.parameters(), lr=a.lr)
kept = get_batch("train")
for step in range(a.steps):
    if step and step % 30 == 0 and not a.one_batch:
        print(step, {k: round(v, 3) for k, v in estimate_loss(model).items()})
    x, y = kept if a.one_batch else get_batch("train")
    _, loss = model(x, y)
    optimizer.zero_grad(set_to_none=True)
    loss.backward()
    optimizer.step()
print("last", loss.item())
