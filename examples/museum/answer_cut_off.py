"""Long prompts are cut off on the right, and with them the answer: every label is ignored and the loss is NaN.

Samples are laid out as prompt, then answer; the prompt's labels are -100, and both lists are cut to `max_length`. When the prompt alone is
that long, no label is left and the mean of the loss is over nothing. Others saw "loss 0.0" or a NaN at evaluation. Batches are small here,
as they are there. Repair: keep the answer and cut the prompt.

Thread: https://github.com/bytedance/UniVR/issues/13
Thread: https://github.com/huggingface/trl/issues/6668
Condition: missing-targets
"""

import random
import sys
from pathlib import Path

import torch
from torch import nn

FIXED = "fixed" in sys.argv[1:]
MAX_LENGTH, DIM, STEPS = 64, 48, 60
IGNORE = -100

text = (Path(__file__).resolve().parent.parent / "data" / "tinyshakespeare.txt").read_text()[:120_000]
ids = {character: number for number, character in enumerate(sorted(set(text)), 1)}
speeches = [speech for speech in text.split("\n\n") if "\n" in speech]
pairs = list(zip(speeches, speeches[1:], strict=False))


def sample(prompt, answer):
    prompt_ids, answer_ids = [ids[c] for c in prompt], [ids[c] for c in answer[:32]]
    if FIXED:
        prompt_ids = prompt_ids[-(MAX_LENGTH - len(answer_ids)) :]
    input_ids, labels = prompt_ids + answer_ids, [IGNORE] * len(prompt_ids) + answer_ids
    return torch.tensor(input_ids[:MAX_LENGTH]), torch.tensor(labels[:MAX_LENGTH])


def collate(samples):
    input_ids = nn.utils.rnn.pad_sequence([s[0] for s in samples], batch_first=True, padding_value=0)
    return input_ids, nn.utils.rnn.pad_sequence([s[1] for s in samples], batch_first=True, padding_value=IGNORE)


class Model(nn.Module):
    def __init__(self):
        super().__init__()
        self.tokens, self.positions = nn.Embedding(len(ids) + 1, DIM, padding_idx=0), nn.Embedding(MAX_LENGTH, DIM)
        layer = nn.TransformerEncoderLayer(DIM, 4, 2 * DIM, dropout=0.0, batch_first=True, norm_first=True)
        self.layers = nn.TransformerEncoder(layer, 2, norm=nn.LayerNorm(DIM), enable_nested_tensor=False)
        self.head = nn.Linear(DIM, len(ids) + 1)

    def forward(self, x):
        mask = nn.Transformer.generate_square_subsequent_mask(x.shape[1])
        return self.head(self.layers(self.tokens(x) + self.positions(torch.arange(x.shape[1])), mask=mask, is_causal=True))


random.seed(4)
torch.manual_seed(4)
model = Model()
optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3)
criterion = nn.CrossEntropyLoss(ignore_index=IGNORE)
for step in range(STEPS):
    input_ids, labels = collate([sample(*pair) for pair in random.sample(pairs, 2)])
    logits = model(input_ids)
    loss = criterion(logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten())
    optimizer.zero_grad()
    loss.backward()
    nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    optimizer.step()
    if step % 10 == 9:
        print(f"step {step + 1}: loss {loss.item():.3f}")
