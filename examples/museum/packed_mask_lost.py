"""Packed sequences read one another: an attention mask of ones switches off the mask that keeps them apart.

Several texts were packed into one row, their boundaries told by positions that begin again at 0. The code that builds the block-diagonal
mask looked at them only where no `attention_mask` was given; packed training passes one that is all ones. The mask was not built, the
plain causal path was taken, and later texts attended to earlier ones. "Loss still decreases, so it is silent and easy to miss." Repair:
drop `attention_mask is None` from the test.

Thread: https://github.com/huggingface/transformers/pull/46634
Condition: packing-contamination
"""

import random
import sys
from pathlib import Path

import torch
from torch import nn
from torch.nn import functional as F

FIXED = "fixed" in sys.argv[1:]
STEPS, BATCH, LENGTH, DIM, HEADS, LAYERS = 40, 6, 96, 48, 4, 2

text = (Path(__file__).resolve().parent.parent / "data" / "tinyshakespeare.txt").read_text()[:100_000]
characters = sorted(set(text))
index = {character: number for number, character in enumerate(characters)}
speeches = [[index[c] for c in speech] for speech in text.split("\n\n") if 10 < len(speech) < 60]


def create_causal_mask(attention_mask, position_ids):
    """`(B, 1, T, T)`, True where a position may look; None for the plain causal fast path."""
    if position_ids is not None and (attention_mask is None or FIXED):
        documents = (position_ids == 0).cumsum(1)
        same = documents[:, :, None] == documents[:, None, :]
        return (same & torch.ones_like(same).tril())[:, None]
    if attention_mask is not None and bool(attention_mask.all()):
        return None
    return attention_mask[:, None, None, :].bool() & torch.ones(LENGTH, LENGTH, dtype=torch.bool).tril()


class DecoderLayer(nn.Module):
    def __init__(self):
        super().__init__()
        self.input_layernorm, self.post_attention_layernorm = nn.RMSNorm(DIM), nn.RMSNorm(DIM)
        self.q_proj, self.k_proj, self.v_proj, self.o_proj = (nn.Linear(DIM, DIM, bias=False) for _ in range(4))
        self.mlp = nn.Sequential(nn.Linear(DIM, 4 * DIM), nn.SiLU(), nn.Linear(4 * DIM, DIM))

    def forward(self, x, mask):
        B, T, _ = x.shape
        h = self.input_layernorm(x)
        q, k, v = (part(h).view(B, T, HEADS, -1).transpose(1, 2) for part in (self.q_proj, self.k_proj, self.v_proj))
        mixed = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=mask is None)
        x = x + self.o_proj(mixed.transpose(1, 2).reshape(B, T, DIM))
        return x + self.mlp(self.post_attention_layernorm(x))


class CausalLM(nn.Module):
    def __init__(self):
        super().__init__()
        self.embed_tokens, self.embed_positions = nn.Embedding(len(characters), DIM), nn.Embedding(LENGTH, DIM)
        self.layers = nn.ModuleList(DecoderLayer() for _ in range(LAYERS))
        self.norm, self.lm_head = nn.RMSNorm(DIM), nn.Linear(DIM, len(characters), bias=False)

    def forward(self, input_ids, attention_mask=None, position_ids=None):
        mask = create_causal_mask(attention_mask, position_ids)
        x = self.embed_tokens(input_ids) + self.embed_positions(position_ids)
        for layer in self.layers:
            x = layer(x, mask)
        return self.lm_head(self.norm(x))


def packed_row():
    tokens, positions = [], []
    while len(tokens) <= LENGTH:
        speech = random.choice(speeches)
        tokens += speech
        positions += range(len(speech))
    return tokens[: LENGTH + 1], positions[: LENGTH + 1]


random.seed(0)
torch.manual_seed(0)
model = CausalLM()
optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3)

for step in range(STEPS):
    tokens, positions = (torch.tensor(part) for part in zip(*(packed_row() for _ in range(BATCH))))
    labels = tokens[:, 1:].masked_fill(positions[:, 1:] == 0, -100)
    attention_mask = torch.ones(BATCH, LENGTH, dtype=torch.long)
    logits = model(tokens[:, :-1], attention_mask=attention_mask, position_ids=positions[:, :-1])
    loss = F.cross_entropy(logits.flatten(0, 1), labels.flatten())
    optimizer.zero_grad()
    loss.backward()
    nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    optimizer.step()
    if step % 10 == 9:
        print(f"step {step + 1}: loss {loss.item():.3f}")
