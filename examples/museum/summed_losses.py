"""The mean loss for the log is summed from tensors that still carry their graphs: memory grows with every batch.

`running_loss` in a label model, `loss_sum` in a fine-tuning template: both added the loss itself, and with it the graph of every batch of
the epoch. "For a large enough training set my GPU runs out of memory." Repair: add `loss.item()`.

Thread: https://github.com/BatsResearch/labelmodels/issues/4
Thread: https://github.com/ray-project/ray/pull/40940
Condition: memory-leak
"""

import sys
from pathlib import Path

import torch
from torch import nn
from torch.utils.data import DataLoader, Dataset

FIXED = "fixed" in sys.argv[1:]
CONTEXT, DIM = 48, 48

text = (Path(__file__).resolve().parent.parent / "data" / "tinyshakespeare.txt").read_text()[:40_000]
characters = sorted(set(text))


class Windows(Dataset):
    def __init__(self):
        self.ids = torch.tensor([characters.index(c) for c in text])

    def __len__(self):
        return (len(self.ids) - 1) // CONTEXT

    def __getitem__(self, index):
        window = self.ids[index * CONTEXT : (index + 1) * CONTEXT + 1]
        return window[:-1], window[1:]


class Decoder(nn.Module):
    def __init__(self):
        super().__init__()
        self.embed, self.where = nn.Embedding(len(characters), DIM), nn.Embedding(CONTEXT, DIM)
        layer = nn.TransformerEncoderLayer(DIM, 4, 4 * DIM, dropout=0.1, batch_first=True, norm_first=True)
        self.layers = nn.TransformerEncoder(layer, 2, norm=nn.LayerNorm(DIM), enable_nested_tensor=False)
        self.head = nn.Linear(DIM, len(characters))

    def forward(self, ids):
        mask = nn.Transformer.generate_square_subsequent_mask(ids.shape[1])
        return self.head(self.layers(self.embed(ids) + self.where(torch.arange(ids.shape[1])), mask=mask, is_causal=True))


def train_epoch(model, loader, optimizer, criterion):
    loss_sum = 0
    for inputs, labels in loader:
        optimizer.zero_grad()
        loss = criterion(model(inputs).transpose(1, 2), labels)
        loss.backward()
        optimizer.step()
        loss_sum += loss.item() if FIXED else loss
    return loss_sum / len(loader)


torch.manual_seed(0)
model = Decoder()
loader = DataLoader(Windows(), batch_size=12, shuffle=True, drop_last=True)
optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3)
criterion = nn.CrossEntropyLoss()
print(f"mean loss {float(train_epoch(model, loader, optimizer, criterion)):.3f}")
