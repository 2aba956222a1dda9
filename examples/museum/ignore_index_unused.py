"""`ignore_index` is a setting of the model, and its loss does not read it: padding is learned.

Captions were padded with 0 to a fixed length, the model took an `ignore_index`, and the loss was called without it. Most targets of a short
caption are then padding, which is easy to predict: the loss is low for no reason. Here the captions are lines of plays.
Repair: pass it on.

Thread: https://github.com/lucidrains/DALLE-pytorch/issues/57
Condition: padding-in-loss
"""

import random
import sys
from pathlib import Path

import torch
from torch import nn
from torch.nn import functional as F

FIXED = "fixed" in sys.argv[1:]
TEXT_SEQ_LEN, DIM, BATCH, STEPS = 48, 48, 12, 80

text = (Path(__file__).resolve().parent.parent / "data" / "tinyshakespeare.txt").read_text()[:120_000]
lines = [line for line in text.split("\n") if 8 < len(line) < TEXT_SEQ_LEN]
ids = {character: number for number, character in enumerate(sorted(set(text)), 2)}
BOS = 1


def tokenize(captions, context_length):
    result = torch.zeros(len(captions), context_length, dtype=torch.long)
    for row, caption in zip(result, captions, strict=True):
        tokens = [BOS] + [ids[c] for c in caption]
        row[: len(tokens)] = torch.tensor(tokens)
    return result


class CausalTransformer(nn.Module):
    def __init__(self, num_tokens, ignore_index):
        super().__init__()
        self.ignore_index = ignore_index
        self.text_emb, self.text_pos_emb = nn.Embedding(num_tokens, DIM), nn.Embedding(TEXT_SEQ_LEN, DIM)
        layer = nn.TransformerEncoderLayer(DIM, 4, 4 * DIM, dropout=0.0, activation="gelu", batch_first=True, norm_first=True)
        self.transformer = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)
        self.to_logits = nn.Sequential(nn.LayerNorm(DIM), nn.Linear(DIM, num_tokens))

    def forward(self, text):
        inputs, labels = text[:, :-1], text[:, 1:]
        length = inputs.shape[1]
        x = self.text_emb(inputs) + self.text_pos_emb(torch.arange(length))
        logits = self.to_logits(self.transformer(x, mask=nn.Transformer.generate_square_subsequent_mask(length), is_causal=True))
        if FIXED:
            return F.cross_entropy(logits.transpose(1, 2), labels, ignore_index=self.ignore_index)
        return F.cross_entropy(logits.transpose(1, 2), labels)


random.seed(0)
torch.manual_seed(0)
model = CausalTransformer(num_tokens=len(ids) + 2, ignore_index=0)
optimizer = torch.optim.Adam(model.parameters(), lr=2e-3)
for step in range(STEPS):
    loss = model(tokenize(random.sample(lines, BATCH), TEXT_SEQ_LEN))
    loss.backward()
    nn.utils.clip_grad_norm_(model.parameters(), 0.5)
    optimizer.step()
    optimizer.zero_grad()
    if step % 20 == 19:
        print(f"step {step + 1}: loss {loss.item():.3f}")
