"""On two processes the learning rate is zero after half of the run.

A translation script without a trainer builds its schedule for `max_train_steps` and gives it to Accelerate, which steps a prepared
scheduler once for each process at every optimizer step. "I find that the learning rate is 0 after half of args.max_train_steps", says the
report, with two GPUs; the warm-up is half as long as well. Repair: multiply both numbers by the number of processes.

Thread: https://github.com/huggingface/transformers/issues/26827
Thread: https://github.com/huggingface/diffusers/issues/3954
Condition: schedule-misconfigured
Launch: torchrun
"""

import sys
from pathlib import Path

import torch
from accelerate import Accelerator
from torch import nn
from torch.utils.data import DataLoader, TensorDataset
from transformers import get_scheduler

FIXED = "fixed" in sys.argv[1:]
CONTEXT, DIM, BATCH, MAX_TRAIN_STEPS, NUM_WARMUP_STEPS = 32, 32, 8, 60, 6

accelerator = Accelerator(cpu=True)
torch.set_num_threads(1)
torch.manual_seed(0)
text = (Path(__file__).resolve().parent.parent / "data" / "tinyshakespeare.txt").read_text()[:200_000]
characters = sorted(set(text))
data = torch.tensor([characters.index(c) for c in text])
rows = data[: len(data) // (CONTEXT + 1) * (CONTEXT + 1)].view(-1, CONTEXT + 1)


class Model(nn.Module):
    def __init__(self):
        super().__init__()
        self.embedding = nn.Embedding(len(characters), DIM)
        self.rnn = nn.LSTM(DIM, 2 * DIM, batch_first=True)
        self.head = nn.Linear(2 * DIM, len(characters))

    def forward(self, ids):
        return self.head(self.rnn(self.embedding(ids))[0])


model = Model()
optimizer = torch.optim.AdamW(model.parameters(), lr=5e-3)
loader = DataLoader(TensorDataset(rows), batch_size=BATCH, shuffle=True)
processes = accelerator.num_processes if FIXED else 1
lr_scheduler = get_scheduler(
    "linear", optimizer=optimizer, num_warmup_steps=NUM_WARMUP_STEPS * processes, num_training_steps=MAX_TRAIN_STEPS * processes
)
model, optimizer, loader, lr_scheduler = accelerator.prepare(model, optimizer, loader, lr_scheduler)

for completed_steps, (batch,) in enumerate(loader, 1):
    logits = model(batch[:, :-1])
    loss = nn.functional.cross_entropy(logits.flatten(0, 1), batch[:, 1:].flatten())
    accelerator.backward(loss)
    optimizer.step()
    lr_scheduler.step()
    optimizer.zero_grad()
    if completed_steps % 15 == 0:
        accelerator.print(f"step {completed_steps}: loss {loss.item():.3f}, lr {lr_scheduler.get_last_lr()[0]:.2e}")
    if completed_steps >= MAX_TRAIN_STEPS:
        break
accelerator.end_training()
