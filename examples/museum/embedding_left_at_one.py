"""The word embedding is the head as well and was never initialised: the first loss is many times that of a blind guess.

A language model's layers were initialised with a small standard deviation, its embedding was left at `nn.Embedding`'s default of 1. "The
loss scale was very poor": more than 3,000 at the start for a model of 7 billion parameters, where ln(vocabulary) is about 10. Here the model
has 48 channels. Repair: initialise the embedding like the rest.

Thread: https://github.com/syncdoth/RetNet/issues/31
Condition: poor-initialization
"""

import sys
from pathlib import Path

import torch
from torch import nn
from torch.nn import functional as F

FIXED = "fixed" in sys.argv[1:]
DIM, HEADS, LAYERS, CONTEXT, BATCH, STEPS = 64, 4, 2, 48, 8, 80

text = (Path(__file__).resolve().parent.parent / "data" / "tinyshakespeare.txt").read_text()[:100_000]
characters = sorted(set(text))
data = torch.tensor([characters.index(c) for c in text])


class Layer(nn.Module):
    def __init__(self):
        super().__init__()
        self.retention_norm, self.ffn_norm = nn.LayerNorm(DIM), nn.LayerNorm(DIM)
        self.qkv, self.out = nn.Linear(DIM, 3 * DIM), nn.Linear(DIM, DIM)
        self.fc1, self.fc2 = nn.Linear(DIM, 4 * DIM), nn.Linear(4 * DIM, DIM)

    def forward(self, x):
        B, T, _ = x.shape
        q, k, v = (part.view(B, T, HEADS, -1).transpose(1, 2) for part in self.qkv(self.retention_norm(x)).chunk(3, dim=-1))
        x = x + self.out(F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2).reshape(B, T, DIM))
        return x + self.fc2(F.gelu(self.fc1(self.ffn_norm(x))))


class LanguageModel(nn.Module):
    def __init__(self):
        super().__init__()
        self.embed_tokens, self.embed_positions = nn.Embedding(len(characters), DIM), nn.Embedding(CONTEXT, DIM)
        self.layers = nn.ModuleList(Layer() for _ in range(LAYERS))
        self.norm, self.lm_head = nn.LayerNorm(DIM), nn.Linear(DIM, len(characters), bias=False)
        self.apply(self._init_weights)
        self.lm_head.weight = self.embed_tokens.weight

    def _init_weights(self, module):
        if isinstance(module, nn.Linear):
            nn.init.normal_(module.weight, mean=0.0, std=0.02)
            if module.bias is not None:
                nn.init.zeros_(module.bias)
        elif FIXED and isinstance(module, nn.Embedding):
            nn.init.normal_(module.weight, mean=0.0, std=0.02)

    def forward(self, ids):
        x = self.embed_tokens(ids) + self.embed_positions(torch.arange(ids.shape[1]))
        for layer in self.layers:
            x = layer(x)
        return self.lm_head(self.norm(x))


torch.manual_seed(0)
model = LanguageModel()
optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, betas=(0.9, 0.98), weight_decay=0.05)
for step in range(STEPS):
    starts = torch.randint(len(data) - CONTEXT - 1, (BATCH,))
    batch = torch.stack([data[s : s + CONTEXT + 1] for s in starts])
    loss = F.cross_entropy(model(batch[:, :-1]).flatten(0, 1), batch[:, 1:].flatten())
    optimizer.zero_grad()
    loss.backward()
    nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    optimizer.step()
    if step == 0 or step % 20 == 19:
        print(f"step {step + 1}: loss {loss.item():.3f}")
