"""The model ends in a softmax and its loss begins with one: the loss cannot get low.

A tutorial that builds a Llama from nothing starts with this model. `cross_entropy` takes logits; given probabilities between 0 and 1 it can
tell the right character from 64 wrong ones only by e to 1, so the loss hardly leaves ln(65). Others found the same in published code.
Repair: no softmax in the model.

Thread: https://github.com/bkitano/llama-from-scratch/issues/5
Thread: https://github.com/ariecattan/SciCo/issues/2
Condition: squashed-logits
"""

import sys
from pathlib import Path

import torch
from torch import nn
from torch.nn import functional as F

FIXED = "fixed" in sys.argv[1:]
MASTER_CONFIG = {"context_window": 16, "batch_size": 32, "d_model": 64, "epochs": 150}

lines = (Path(__file__).resolve().parent.parent / "data" / "tinyshakespeare.txt").read_text()
vocab = sorted(set(lines))
itos = dict(enumerate(vocab))
stoi = {ch: i for i, ch in itos.items()}
MASTER_CONFIG["vocab_size"] = len(vocab)
dataset = torch.tensor([stoi[ch] for ch in lines[:200_000]])


def get_batches(data, batch_size, context_window):
    ix = torch.randint(0, data.size(0) - context_window - 1, (batch_size,))
    x = torch.stack([data[i : i + context_window] for i in ix])
    y = torch.stack([data[i + 1 : i + context_window + 1] for i in ix])
    return x, y


class SimpleModel(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.config = config
        self.embedding = nn.Embedding(config["vocab_size"], config["d_model"])
        self.linear = nn.Sequential(
            nn.Linear(config["d_model"], config["d_model"]), nn.ReLU(), nn.Linear(config["d_model"], config["vocab_size"])
        )

    def forward(self, idx, targets=None):
        a = self.linear(self.embedding(idx))
        logits = a if FIXED else F.softmax(a, dim=-1)
        if targets is None:
            return logits
        loss = F.cross_entropy(logits.view(-1, self.config["vocab_size"]), targets.view(-1))
        return logits, loss


torch.manual_seed(0)
model = SimpleModel(MASTER_CONFIG)
optimizer = torch.optim.Adam(model.parameters(), lr=3e-3)
for epoch in range(MASTER_CONFIG["epochs"]):
    optimizer.zero_grad()
    xs, ys = get_batches(dataset, MASTER_CONFIG["batch_size"], MASTER_CONFIG["context_window"])
    logits, loss = model(xs, targets=ys)
    loss.backward()
    optimizer.step()
    if epoch % 30 == 29:
        print(f"epoch {epoch + 1}: loss {loss.item():.3f}")
