"""A forecaster for one step ahead compares (batch, 1) with (batch,): the loss is that of every pair in the batch.

Four forecasting models trained well for several steps ahead; for one, their output has shape (64, 1) and the target (64,), and the squared
error broadcasts to 64 x 64. The best the model can do is the mean of the batch. In the report 96 runs had been judged failures with this in
them; PyTorch warns once. Repair: give the target the prediction's shape.

Thread: https://github.com/jsboige/CoursIA/pull/926
Thread: https://github.com/pytorch/pytorch/pull/18349
Condition: silent-broadcast
"""

import math
import sys

import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

FIXED = "fixed" in sys.argv[1:]
WINDOW, PATCH, DIM, PRED_LEN = 48, 8, 32, 1


class PatchForecaster(nn.Module):
    def __init__(self, pred_len):
        super().__init__()
        self.embed = nn.Linear(PATCH, DIM)
        self.position = nn.Parameter(0.02 * torch.randn(WINDOW // PATCH, DIM))
        layer = nn.TransformerEncoderLayer(DIM, 4, 64, dropout=0.0, activation="gelu", batch_first=True, norm_first=True)
        self.encoder = nn.TransformerEncoder(layer, 2, norm=nn.LayerNorm(DIM), enable_nested_tensor=False)
        self.head = nn.Linear(DIM * WINDOW // PATCH, pred_len)

    def forward(self, x):
        h = self.encoder(self.embed(x.view(x.shape[0], -1, PATCH)) + self.position)
        return self.head(h.flatten(1))


torch.manual_seed(0)
time = torch.arange(3000, dtype=torch.float32)
series = torch.sin(2 * math.pi * time / 24) + 0.5 * torch.sin(2 * math.pi * time / 37 + 1) + 0.1 * torch.randn(3000)
series = (series - series.mean()) / series.std()
windows = series.unfold(0, WINDOW + PRED_LEN, 1)
inputs, targets = windows[:, :WINDOW].contiguous(), windows[:, -PRED_LEN:].squeeze(-1).contiguous()
loader = DataLoader(TensorDataset(inputs, targets), batch_size=64, shuffle=True, drop_last=True)

model = PatchForecaster(PRED_LEN)
optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
criterion = nn.MSELoss()
for epoch in range(2):
    for x_batch, y_batch in loader:
        pred = model(x_batch)
        loss = criterion(pred, y_batch.view_as(pred) if FIXED else y_batch)
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
    print(f"epoch {epoch + 1}: mse {loss.item():.4f}")
