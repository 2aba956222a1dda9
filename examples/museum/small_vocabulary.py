"""The text embedding keeps its default size, the tokenizer knows more words: a rare word ends the run.

A text-to-image transformer had 10,000 text tokens by default and came with a tokenizer of about 40,000. "For most cases, this won't lead
to any problems", until a caption holds a rarer word: id 20,000 in a table of 10,000 rows; on a GPU that is a device-side assert far from
its cause. Here the words are numbered by frequency and the default is 2,000. Repair: as many rows as the tokenizer has words.

Thread: https://github.com/lucidrains/DALLE-pytorch/issues/56
Condition: token-id-out-of-range
Exit: 1
"""

import random
import sys
from collections import Counter
from pathlib import Path

import torch
from torch import nn
from torch.nn import functional as F

FIXED = "fixed" in sys.argv[1:]
DIM, CONTEXT, BATCH, STEPS = 48, 24, 4, 60


class Tokenizer:
    def __init__(self, text):
        ranked = [word for word, _ in Counter(text.split()).most_common()]
        self.ids = {word: number for number, word in enumerate(ranked)}
        self.vocab_size = len(ranked)

    def tokenize(self, line):
        return [self.ids[word] for word in line.split()]


class TextModel(nn.Module):
    def __init__(self, num_text_tokens=2000):
        super().__init__()
        self.text_emb = nn.Embedding(num_text_tokens, DIM)
        self.text_pos_emb = nn.Embedding(CONTEXT, DIM)
        layer = nn.TransformerEncoderLayer(DIM, 4, 4 * DIM, dropout=0.0, batch_first=True, norm_first=True)
        self.transformer = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)
        self.to_logits = nn.Sequential(nn.LayerNorm(DIM), nn.Linear(DIM, num_text_tokens))

    def forward(self, text):
        length = text.shape[1]
        x = self.text_emb(text) + self.text_pos_emb(torch.arange(length))
        return self.to_logits(self.transformer(x, mask=nn.Transformer.generate_square_subsequent_mask(length), is_causal=True))


text = (Path(__file__).resolve().parent.parent / "data" / "tinyshakespeare.txt").read_text()[:60_000]
tokenizer = Tokenizer(text)
lines = [line for line in text.split("\n") if len(line.split()) >= 4]
common = [line for line in lines if max(tokenizer.tokenize(line)) < 2000]
random.seed(0)
torch.manual_seed(0)
captions = common[:120] + random.sample(lines, 120)  # the first ones happen to be made of common words

model = TextModel(num_text_tokens=tokenizer.vocab_size) if FIXED else TextModel()
optimizer = torch.optim.Adam(model.parameters(), lr=2e-3)
for step in range(STEPS):
    chosen = [tokenizer.tokenize(captions[(step * BATCH + n) % len(captions)]) for n in range(BATCH)]
    shortest = min(len(c) for c in chosen)
    batch = torch.tensor([c[:shortest] for c in chosen])
    loss = F.cross_entropy(model(batch[:, :-1]).flatten(0, 1), batch[:, 1:].flatten())
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
    if step % 10 == 9:
        print(f"step {step + 1}: loss {loss.item():.3f}")
