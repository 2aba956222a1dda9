"""A spike in the training loss: two batches are garbage.

Pre-training of the Mistral GPT-2 models showed large spikes from which the loss recovered, "but it can take quite a long time". One
hypothesis of the report is bad batches, where the data is garbage and gives bad gradients. Here a stretch of the corpus is what a broken
extraction leaves, one character over and over in no order of the language. Repair: leave it out.

Thread: https://github.com/stanford-crfm/mistral/issues/115
Condition: loss-spike
"""

import sys
from pathlib import Path

import torch
from torch import nn
from torch.nn import functional as F

FIXED = "fixed" in sys.argv[1:]
STEPS, BATCH, CONTEXT, DIM, HEADS, LAYERS = 150, 8, 32, 48, 4, 2

text = (Path(__file__).resolve().parent.parent / "data" / "tinyshakespeare.txt").read_text()[:60_000]
characters = sorted(set(text))
documents = [text[start : start + CONTEXT + 1] for start in range(0, len(text) - CONTEXT, CONTEXT + 1)]
torch.manual_seed(0)
documents = [documents[number] for number in torch.randperm(len(documents)).tolist()]
if not FIXED:
    # A page without text: rules and page marks, read as the rarest of characters.
    marks = sorted(characters, key=text.count)[:6]
    for number in range(100 * BATCH, 102 * BATCH):
        documents[number] = "".join(marks[i] for i in torch.randint(len(marks), (CONTEXT + 1,)).tolist())
corpus = torch.tensor([[characters.index(c) for c in document] for document in documents])


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(DIM), nn.LayerNorm(DIM)
        self.qkv, self.out = nn.Linear(DIM, 3 * DIM), nn.Linear(DIM, DIM)
        self.mlp = nn.Sequential(nn.Linear(DIM, 4 * DIM), nn.GELU(), nn.Linear(4 * DIM, DIM))

    def forward(self, x):
        B, T, _ = x.shape
        q, k, v = self.qkv(self.norm1(x)).view(B, T, 3, HEADS, -1).permute(2, 0, 3, 1, 4)
        x = x + self.out(F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2).reshape(B, T, DIM))
        return x + self.mlp(self.norm2(x))


class GPT(nn.Module):
    def __init__(self):
        super().__init__()
        self.wte, self.wpe = nn.Embedding(len(characters), DIM), nn.Embedding(CONTEXT, DIM)
        self.h = nn.Sequential(*(Block() for _ in range(LAYERS)))
        self.ln_f, self.lm_head = nn.LayerNorm(DIM), nn.Linear(DIM, len(characters))

    def forward(self, x):
        return self.lm_head(self.ln_f(self.h(self.wte(x) + self.wpe(torch.arange(x.shape[1])))))


model = GPT()
optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3, betas=(0.9, 0.95))
schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: min(1.0, (step + 1) / 15))

for step in range(STEPS):
    rows = corpus[step * BATCH : (step + 1) * BATCH]
    loss = F.cross_entropy(model(rows[:, :-1]).flatten(0, 1), rows[:, 1:].flatten())
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
    schedule.step()
    if step % 25 == 24 or 98 <= step < 104:
        print(f"step {step + 1}: loss {loss.item():.3f}")
