"""Word-level language modelling with nn.TransformerEncoder, columns of a long text as the batch (the wikitext tutorial)."""

import copy
import math
import re
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path

import torch
from torch import nn

torch.set_num_threads(1)
torch.manual_seed(1111)
option = dict(a.split("=") for a in sys.argv[1:])
trouble = option.get("trouble", "none")


class TransformerModel(nn.Module):
    def __init__(self, ntoken, d_model, nhead, d_hid, nlayers, dropout=0.1):
        super().__init__()
        self.position = nn.Embedding(64, d_model)
        self.transformer_encoder = nn.TransformerEncoder(
            nn.TransformerEncoderLayer(d_model, nhead, d_hid, dropout, batch_first=trouble == "batchfirst"), nlayers
        )
        self.embedding = nn.Embedding(ntoken, d_model)
        self.d_model = d_model
        self.linear = nn.Linear(d_model, ntoken)
        if option.get("tie"):
            self.linear.weight = self.embedding.weight
        self.embedding.weight.data.uniform_(-0.1, 0.1)
        self.linear.bias.data.zero_()

    def forward(self, src, src_mask=None):
        n = src.size(0)
        x = self.embedding(src) * math.sqrt(self.d_model) + self.position(torch.arange(n))[:, None]
        if src_mask is None:
            src_mask = nn.Transformer.generate_square_subsequent_mask(n)
        if trouble == "nomask":
            src_mask = None
        elif trouble == "inverted":
            src_mask = torch.tril(torch.ones(n, n, dtype=torch.bool))
            src_mask[-1] = False
        elif trouble == "batchfirst":
            src_mask = None
        return self.linear(self.transformer_encoder(x, src_mask))


words = re.findall(
    r"[a-z']+|[.,;!?]", (Path(__file__).resolve().parents[2] / "examples/data/tinyshakespeare.txt").read_text()[:80_000].lower()
)
keep = [w for w, _ in Counter(words).most_common(300)]
vocab = {w: i + 1 for i, w in enumerate(keep)}
data = torch.tensor([vocab.get(w, 0) for w in words])


def batchify(d, bsz):
    n = d.size(0) // bsz
    return d[: n * bsz].view(bsz, n).t().contiguous()


bptt = 24
train, val = batchify(data[:13000], 16), batchify(data[13000:], 10)


def get_batch(source, i):
    n = min(bptt, len(source) - 1 - i)
    d = source[i : i + n]
    gap = 0 if trouble == "gap0" else 1
    return d, source[i + gap : i + gap + n].reshape(-1)


model = TransformerModel(301, 64, 4, 96, 2)
criterion = nn.CrossEntropyLoss()
lr = 30.0 if trouble == "lr" else 0.5
optimizer = torch.optim.SGD(model.parameters(), lr=lr)
scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 1.0, gamma=0.95)
best, start = float("inf"), time.time()
with tempfile.TemporaryDirectory() as folder:
    for epoch in range(2):
        if trouble != "eval":
            model.train()
        else:
            model.eval()
        for i in range(0, min(train.size(0) - 1, 25 * bptt), bptt):
            d, targets = get_batch(train, i)
            if trouble == "repeat":
                d, targets = get_batch(train, 0)
            loss = criterion(model(d).view(-1, 301), targets)
            optimizer.zero_grad()
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 0.5 if trouble != "lr" else 100.0)
            optimizer.step()
        model.eval()
        total = 0.0
        with torch.no_grad():
            for i in range(0, val.size(0) - 1, bptt):
                d, targets = get_batch(val, i)
                total += len(d) * criterion(model(d).view(-1, 301), targets).item()
        total /= len(val) - 1
        print(f"epoch {epoch} val {total:.3f} ppl {math.exp(min(total, 20)):.1f} {time.time() - start:.1f}s")
        if total < best:
            best = total
            torch.save(copy.deepcopy(model.state_dict()), Path(folder) / "best.pt")
        scheduler.step()
    model.load_state_dict(torch.load(Path(folder) / "best.pt"))
