"""Weights are tied while the model is still on the meta device; when it gets memory, the tie is gone.

`use_weight_tying: true` with `meta_device: true` gave `wte.weight` and `lm_head.weight` different numbers: `to_empty` makes a new parameter
for every module, and what shared one parameter before now has two. Both were initialised and trained on their own, and the head was paid
for twice. Repair: tie again once the weights are real.

Thread: https://github.com/Modalities/modalities/issues/357
Condition: untied-embeddings
"""

import sys
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import nn
from torch.nn import functional as F

FIXED = "fixed" in sys.argv[1:]


@dataclass
class GPT2Config:
    vocab_size: int
    sequence_length: int = 48
    n_layer: int = 2
    n_head: int = 4
    n_embd: int = 48
    use_weight_tying: bool = True
    use_meta_device: bool = True


class Block(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.n_head = config.n_head
        self.attention_norm, self.ffn_norm = nn.LayerNorm(config.n_embd), nn.LayerNorm(config.n_embd)
        self.c_attn, self.c_proj = nn.Linear(config.n_embd, 3 * config.n_embd), nn.Linear(config.n_embd, config.n_embd)
        self.mlp = nn.Sequential(nn.Linear(config.n_embd, 4 * config.n_embd), nn.GELU(), nn.Linear(4 * config.n_embd, config.n_embd))

    def forward(self, x):
        batch, length, width = x.shape
        qkv = self.c_attn(self.attention_norm(x)).view(batch, length, 3, self.n_head, width // self.n_head)
        q, k, v = qkv.permute(2, 0, 3, 1, 4)
        x = x + self.c_proj(F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2).reshape(batch, length, width))
        return x + self.mlp(self.ffn_norm(x))


class GPT2LLM(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.config = config
        self.transformer = nn.ModuleDict(
            {
                "wte": nn.Embedding(config.vocab_size, config.n_embd),
                "wpe": nn.Embedding(config.sequence_length, config.n_embd),
                "h": nn.ModuleList(Block(config) for _ in range(config.n_layer)),
                "ln_f": nn.LayerNorm(config.n_embd),
                "lm_head": nn.Linear(config.n_embd, config.vocab_size, bias=False),
            }
        )
        self.tie_weights()

    def tie_weights(self):
        if self.config.use_weight_tying:
            self.transformer["wte"].weight = self.transformer["lm_head"].weight

    def forward(self, ids):
        x = self.transformer["wte"](ids) + self.transformer["wpe"](torch.arange(ids.shape[1]))
        for block in self.transformer["h"]:
            x = block(x)
        return self.transformer["lm_head"](self.transformer["ln_f"](x))


def initialize(module):
    if isinstance(module, nn.Linear | nn.Embedding):
        nn.init.normal_(module.weight, std=0.02)
        if getattr(module, "bias", None) is not None:
            nn.init.zeros_(module.bias)
    elif isinstance(module, nn.LayerNorm):
        nn.init.ones_(module.weight)
        nn.init.zeros_(module.bias)


text = (Path(__file__).resolve().parent.parent / "data" / "tinyshakespeare.txt").read_text()[:100_000]
characters = sorted(set(text))
data = torch.tensor([characters.index(c) for c in text])
torch.manual_seed(0)
config = GPT2Config(vocab_size=len(characters))
with torch.device("meta" if config.use_meta_device else "cpu"):
    model = GPT2LLM(config)
model.to_empty(device="cpu")
if FIXED:
    model.tie_weights()
model.apply(initialize)

optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3)
for step in range(60):
    starts = torch.randint(len(data) - config.sequence_length - 1, (8,))
    batch = torch.stack([data[s : s + config.sequence_length + 1] for s in starts])
    loss = F.cross_entropy(model(batch[:, :-1]).flatten(0, 1), batch[:, 1:].flatten())
    optimizer.zero_grad()
    loss.backward()
    nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    optimizer.step()
    if step % 20 == 19:
        print(f"step {step + 1}: loss {loss.item():.3f}")
