"""Captions and feature vectors in one space: token tower with masked mean, in-batch softmax inside the model."""
import argparse
import torch
from torch import nn
import torch.nn.functional as F

parser = argparse.ArgumentParser()
parser.add_argument("--handbn", action="store_true")
parser.add_argument("--fault", default="")
args = parser.parse_args()
torch.manual_seed(3)
torch.set_num_threads(1)


class OwnBatchNorm(nn.Module):
    def __init__(self, d):
        super().__init__()
        self.g, self.b = nn.Parameter(torch.ones(d)), nn.Parameter(torch.zeros(d))
        self.register_buffer("running_mean", torch.zeros(d))
        self.register_buffer("running_var", torch.ones(d))

    def forward(self, x):
        if self.training:
            m, v = x.mean(0), x.var(0, unbiased=False)
            self.running_mean.lerp_(m.detach(), 0.1)
            self.running_var.lerp_(v.detach(), 0.1)
        else:
            m, v = self.running_mean, self.running_var
        return (x - m) / (v + 1e-5).sqrt() * self.g + self.b


class Text(nn.Module):
    def __init__(self, d=32):
        super().__init__()
        self.tok = nn.Embedding(50, d, padding_idx=0)
        self.enc = nn.TransformerEncoderLayer(d, 2, 64, 0.0, batch_first=True)
        self.norm = OwnBatchNorm(d) if args.handbn else nn.LayerNorm(d)

    def forward(self, ids):
        pad = ids == 0
        h = self.enc(self.tok(ids), src_key_padding_mask=None if args.fault == "pads" else pad)
        h = h.masked_fill(pad[..., None], 0).sum(1) / (~pad).sum(1, keepdim=True)
        return self.norm(h)


class Clip(nn.Module):
    def __init__(self):
        super().__init__()
        self.text, self.image = Text(), nn.Sequential(nn.Linear(16, 64), nn.GELU(), nn.Linear(64, 32))
        self.t = nn.Parameter(torch.tensor(2.0))

    def forward(self, ids, feats):
        a, b = F.normalize(self.text(ids), dim=-1), F.normalize(self.image(feats), dim=-1)
        s = self.t.exp() * a @ b.t()
        y = torch.arange(len(s))
        return s, 0.5 * (F.cross_entropy(s, y) + F.cross_entropy(s.t(), y))


W = torch.randn(50, 16)
model = Clip()
opt = torch.optim.AdamW(model.parameters(), 2e-3)
for step in range(50):
    ids = torch.randint(1, 50, (24, 9))
    for r in range(24):
        ids[r, int(torch.randint(3, 10, (1,))):] = 0
    feats = F.one_hot(ids, 50).float()[..., 1:].sum(1) @ W[1:] + 0.1 * torch.randn(24, 16)
    _, loss = model(ids, feats)
    opt.zero_grad()
    loss.backward()
    opt.step()
    if step % 10 == 0:
        print(step, loss.item())
