"""The labels are shifted by the model and once more by its loss function: it learns to skip a word.

An image captioner shifted logits and labels itself and then called the library's loss function, which since a clean-up shifts by itself.
Position t was trained on token t + 2; flattened before the second shift, a label even came from the next row of the batch. It shipped in
every release from 4.49 on; other models had the same fault. Here a text decoder stands for the captioner.
Repair: only one of the two shifts.

Thread: https://github.com/huggingface/transformers/issues/47394
Thread: https://github.com/huggingface/transformers/pull/46898
Condition: label-misalignment
"""

import sys
from pathlib import Path

import torch
from torch import nn

FIXED = "fixed" in sys.argv[1:]
CONTEXT, DIM, HEADS, BATCH, STEPS = 40, 48, 4, 8, 80


def for_causal_lm_loss(logits, labels, vocab_size, ignore_index=-100, shift_labels=None):
    if shift_labels is None:
        labels = nn.functional.pad(labels, (0, 1), value=ignore_index)
        shift_labels = labels[..., 1:].contiguous()
    return nn.functional.cross_entropy(logits.view(-1, vocab_size), shift_labels.view(-1), ignore_index=ignore_index)


class TextDecoder(nn.Module):
    def __init__(self, vocab_size):
        super().__init__()
        self.vocab_size = vocab_size
        self.embeddings, self.position = nn.Embedding(vocab_size, DIM), nn.Embedding(CONTEXT, DIM)
        layer = nn.TransformerEncoderLayer(DIM, HEADS, 4 * DIM, dropout=0.0, activation="gelu", batch_first=True, norm_first=True)
        self.encoder = nn.TransformerEncoder(layer, 2, norm=nn.LayerNorm(DIM), enable_nested_tensor=False)
        self.output = nn.Linear(DIM, vocab_size)

    def forward(self, input_ids, labels=None):
        length = input_ids.shape[1]
        x = self.embeddings(input_ids) + self.position(torch.arange(length))
        x = self.encoder(x, mask=nn.Transformer.generate_square_subsequent_mask(length), is_causal=True)
        logits = self.output(x)
        if labels is None:
            return logits
        shifted_logits = logits[:, :-1, :].contiguous()
        labels = labels[:, 1:].contiguous()
        if FIXED:
            return for_causal_lm_loss(shifted_logits, None, self.vocab_size, shift_labels=labels)
        return for_causal_lm_loss(shifted_logits.view(-1, self.vocab_size), labels.view(-1), self.vocab_size)


torch.manual_seed(0)
text = (Path(__file__).resolve().parent.parent / "data" / "tinyshakespeare.txt").read_text()[:100_000]
characters = sorted(set(text))
data = torch.tensor([characters.index(c) for c in text])
model = TextDecoder(len(characters))
optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3)
for step in range(STEPS):
    starts = torch.randint(len(data) - CONTEXT, (BATCH,))
    input_ids = torch.stack([data[s : s + CONTEXT] for s in starts])
    loss = model(input_ids, labels=input_ids)
    optimizer.zero_grad()
    loss.backward()
    nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    optimizer.step()
    if step % 20 == 19:
        print(f"step {step + 1}: loss {loss.item():.3f}")
