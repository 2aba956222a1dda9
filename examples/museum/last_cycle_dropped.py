"""The last, partial cycle of gradient accumulation of each epoch is thrown away.

The optimizer steps at every fourth batch only, and the gradients are zeroed when the next epoch begins. Where the number of batches is no
multiple of four, the examples of the last ones are read, computed and lost. `pet` was reported to lose them in this way: "some gradients
are lost", with the repair below, to step at the last batch, too. Here three of seven batches go.

Thread: https://github.com/timoschick/pet/issues/36
Thread: https://github.com/tomhosking/torchseq/issues/8
Condition: accumulation-weighting
"""

import sys

import torch
from torch import nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset

FIXED = "fixed" in sys.argv[1:]
EPOCHS, ACCUMULATION = 6, 4

torch.manual_seed(0)
length, words = 12, 40
sentences = torch.randint(words, (112, length))
# A sentence is positive if it has more words of the first half of the vocabulary than of the second.
labels = ((sentences < words // 2).sum(1) > length // 2).long()
train_dataloader = DataLoader(TensorDataset(sentences, labels), batch_size=16, shuffle=True)


class Classifier(nn.Module):
    def __init__(self):
        super().__init__()
        self.embedding = nn.Embedding(words, 32)
        self.encoder = nn.TransformerEncoderLayer(32, 4, 64, dropout=0.0, batch_first=True, norm_first=True)
        self.head = nn.Linear(32, 2)

    def forward(self, x):
        return self.head(self.encoder(self.embedding(x)).mean(1))


model = Classifier()
optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3)

for epoch in range(EPOCHS):
    model.zero_grad()
    for step, (x, y) in enumerate(train_dataloader):
        loss = F.cross_entropy(model(x), y) / ACCUMULATION
        loss.backward()
        last = FIXED and step + 1 == len(train_dataloader)
        if (step + 1) % ACCUMULATION == 0 or last:
            optimizer.step()
            model.zero_grad()
    print(f"epoch {epoch + 1}: loss {loss.item() * ACCUMULATION:.3f}")
