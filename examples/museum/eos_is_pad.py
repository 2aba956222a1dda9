"""A chat model that never stops: the end token doubles as padding, and padding is ignored by the loss.

Mistral has no pad token, so `tokenizer.pad_token = tokenizer.eos_token` was written, as in many tutorials. The collator of the trainer
sets every label that equals the pad id to -100, and with the padding went the real end of each answer. The loss looked normal; the
fine-tuned model rarely, if ever, generated the end token. Repair: mask the labels by where padding was added, not by its id.

Thread: https://github.com/huggingface/trl/issues/976
Condition: eos-masked
"""

import random
import sys
from pathlib import Path

import torch
from torch import nn
from torch.nn import functional as F

FIXED = "fixed" in sys.argv[1:]
EOS = PAD = 0
DIM, HEADS, LAYERS, CONTEXT, BATCH, STEPS = 48, 4, 2, 64, 8, 60

text = (Path(__file__).resolve().parent.parent / "data" / "tinyshakespeare.txt").read_text()
speeches = [speech.strip() for speech in text[:60_000].split("\n\n")]
speeches = [speech for speech in speeches if 8 < len(speech) < CONTEXT]
characters = sorted(set("".join(speeches)))
index = {character: number + 1 for number, character in enumerate(characters)}


class ChatModel(nn.Module):
    def __init__(self, vocabulary):
        super().__init__()
        self.tokens = nn.Embedding(vocabulary, DIM)
        self.positions = nn.Embedding(CONTEXT, DIM)
        layer = nn.TransformerEncoderLayer(DIM, HEADS, 4 * DIM, dropout=0.0, batch_first=True, norm_first=True)
        self.layers = nn.TransformerEncoder(layer, LAYERS, norm=nn.LayerNorm(DIM), enable_nested_tensor=False)
        self.head = nn.Linear(DIM, vocabulary)

    def forward(self, input_ids, attention_mask):
        length = input_ids.shape[1]
        future = torch.ones(length, length, dtype=torch.bool).triu(1)
        x = self.tokens(input_ids) + self.positions(torch.arange(length))
        return self.head(self.layers(x, mask=future, src_key_padding_mask=attention_mask == 0))


def collate(rows):
    """Rows padded on the right to the longest, a mask of what is text, and the labels."""
    length = max(len(row) for row in rows)
    input_ids = torch.tensor([row + [PAD] * (length - len(row)) for row in rows])
    attention_mask = torch.tensor([[1] * len(row) + [0] * (length - len(row)) for row in rows])
    labels = input_ids.clone()
    labels[attention_mask == 0 if FIXED else labels == PAD] = -100
    return {"input_ids": input_ids, "attention_mask": attention_mask, "labels": labels}


random.seed(0)
torch.manual_seed(0)
examples = [[index[c] for c in speech] + [EOS] for speech in speeches]
model = ChatModel(len(characters) + 1)
optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3)

for step in range(STEPS):
    batch = collate(random.sample(examples, BATCH))
    logits = model(batch["input_ids"][:, :-1], batch["attention_mask"][:, :-1])
    loss = F.cross_entropy(logits.flatten(0, 1), batch["labels"][:, 1:].flatten(), ignore_index=-100)
    optimizer.zero_grad()
    loss.backward()
    nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    optimizer.step()
    if step % 20 == 19:
        print(f"step {step + 1}: loss {loss.item():.3f}")
