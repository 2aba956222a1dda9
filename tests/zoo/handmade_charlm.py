"""Character-level GPT on Shakespeare, single file."""

import argparse
import math
from pathlib import Path

import torch
import torch.nn as nn
from torch.nn import functional as F

ap = argparse.ArgumentParser()
ap.add_argument("--break", dest="bug", default="")
ap.add_argument("--iters", type=int, default=60)
ap.add_argument("--pre", default="scaled")
args = ap.parse_args()
torch.manual_seed(1337)
torch.set_num_threads(1)

text = (Path(__file__).resolve().parents[2] / "examples/data/tinyshakespeare.txt").read_text()[:200_000]
chars = sorted(set(text))
stoi = {c: i for i, c in enumerate(chars)}
data = torch.tensor([stoi[c] for c in text])
n = int(0.9 * len(data))
splits = {"train": data[:n], "val": data[n:]}
block_size, batch_size, n_embd, n_head, n_layer, dropout = 32, 16, 48, 4, 3, 0.1
vocab = len(chars) - (1 if args.bug == "vocab" else 0)


def get_batch(split):
    d = splits[split]
    ix = torch.randint(len(d) - block_size - 2, (batch_size,))
    x = torch.stack([d[i : i + block_size] for i in ix])
    k = {"same": 0, "two": 2}.get(args.bug, 1)
    y = torch.stack([d[i + k : i + k + block_size] for i in ix])
    return x, y


class Head(nn.Module):
    def __init__(self, head_size):
        super().__init__()
        self.key = nn.Linear(n_embd, head_size, bias=False)
        self.query = nn.Linear(n_embd, head_size, bias=False)
        self.value = nn.Linear(n_embd, head_size, bias=False)
        self.register_buffer("tril", torch.tril(torch.ones(block_size, block_size)))
        self.dropout = nn.Dropout(dropout)

    def forward(self, x):
        B, T, C = x.shape
        k, q = self.key(x), self.query(x)
        hs = k.shape[-1]
        wei = q @ k.transpose(-2, -1)
        if args.bug != "noscale":
            wei = wei * (C**-0.5 if args.bug == "wrongscale" else hs**-0.5)
        if args.bug == "triu":
            wei = wei.masked_fill(self.tril.t()[:T, :T] == 0, float("-inf"))
        elif args.bug == "strict":
            wei = wei.masked_fill(torch.ones(T, T).tril(1) == 0, float("-inf"))
        elif args.bug == "aftersoftmax":
            wei = F.softmax(wei, dim=-1)
            wei = wei.masked_fill(self.tril[:T, :T] == 0, 0.0)
            return self.dropout(wei) @ self.value(x)
        elif args.bug != "nomask":
            wei = wei.masked_fill(self.tril[:T, :T] == 0, float("-inf"))
        if args.bug == "softmaxdim":
            wei = F.softmax(wei, dim=0)
        else:
            wei = F.softmax(wei, dim=-1)
        return self.dropout(wei) @ self.value(x)


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        hs = n_embd // n_head
        self.heads = [Head(hs) for _ in range(n_head)] if args.bug == "plainlist" else nn.ModuleList(Head(hs) for _ in range(n_head))
        self.proj = nn.Linear(n_embd, n_embd)
        self.ffwd = nn.Sequential(nn.Linear(n_embd, 4 * n_embd), nn.ReLU(), nn.Linear(4 * n_embd, n_embd), nn.Dropout(dropout))
        self.ln1, self.ln2 = nn.LayerNorm(n_embd), nn.LayerNorm(n_embd)

    def forward(self, x):
        h = self.ln1(x)
        x = x + self.proj(torch.cat([head(h) for head in self.heads], dim=-1))
        return x + self.ffwd(self.ln2(x))


class BigramLanguageModel(nn.Module):
    def __init__(self):
        super().__init__()
        self.token_embedding_table = nn.Embedding(vocab, n_embd)
        self.position_embedding_table = nn.Embedding(block_size, n_embd)
        self.blocks = nn.Sequential(*[Block() for _ in range(n_layer)])
        self.ln_f = nn.LayerNorm(n_embd)
        self.lm_head = nn.Linear(n_embd, vocab)

    def forward(self, idx, targets=None):
        B, T = idx.shape
        x = self.token_embedding_table(idx) + self.position_embedding_table(torch.arange(T))
        logits = self.lm_head(self.ln_f(self.blocks(x)))
        if targets is None:
            return logits, None
        return logits, F.cross_entropy(logits.view(B * T, -1), targets.view(B * T))


@torch.no_grad()
def estimate_loss():
    out = {}
    if args.bug != "evaltrain":
        model.eval()
    for split in ["train", "val"]:
        out[split] = torch.tensor([model(*get_batch(split))[1].item() for _ in range(3)]).mean()
    if args.bug != "stayeval":
        model.train()
    return out


model = BigramLanguageModel()
lr = {"hotlr": 0.3, "sgdhot": 300.0}.get(args.bug, 1e-3)
params = list(model.blocks.parameters()) + list(model.lm_head.parameters()) if args.bug == "somep" else model.parameters()
optimizer = torch.optim.SGD(params, lr=lr) if args.bug == "sgdhot" else torch.optim.AdamW(params, lr=lr)
fixed = get_batch("train")
for it in range(args.iters):
    if it % 20 == 0:
        losses = estimate_loss()
        print(f"step {it}: train {losses['train']:.4f} val {losses['val']:.4f}")
    xb, yb = fixed if args.bug == "onebatch" else get_batch("train")
    _, loss = model(xb, yb)
    if args.bug != "nozero":
        optimizer.zero_grad(set_to_none=True)
    if args.bug != "nobackward":
        loss.backward()
    if args.bug != "nostep":
        optimizer.step()
print("final", loss.item(), math.exp(min(20, loss.item())))
