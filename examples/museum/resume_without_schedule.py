"""A resumed run starts its learning-rate schedule from the beginning, because its state was never saved.

The checkpoint held model and optimizer; the scheduler and the gradient scaler were made anew on resume, so that warm-up began again in
the middle of training and results differed from those of an uninterrupted run. Repair: save and load the scheduler.

Thread: https://github.com/PolymathicAI/the_well/issues/77
Condition: checkpoint-resume-incomplete
Also: loss-spike, schedule-misconfigured
"""

import math
import os
import sys
import tempfile

import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

FIXED = "fixed" in sys.argv[1:]
EPOCHS, INTERRUPTED_AFTER = 8, 4

torch.manual_seed(0)
grid = torch.linspace(0, 2 * math.pi, 32)
phases, speeds = torch.rand(320, 1) * 6, torch.rand(320, 1) + 0.5
fields, later = torch.sin(grid + phases), torch.sin(grid + phases + 0.5 * speeds)
dataset = TensorDataset(torch.stack([fields, speeds.expand_as(fields)], 1), later)
train_dataloader = DataLoader(dataset, batch_size=16, shuffle=True)


class Surrogate(nn.Module):
    def __init__(self):
        super().__init__()
        self.lift = nn.Conv1d(2, 24, 5, padding=2, padding_mode="circular")
        self.middle = nn.Conv1d(24, 24, 5, padding=2, padding_mode="circular")
        self.project = nn.Conv1d(24, 1, 5, padding=2, padding_mode="circular")

    def forward(self, x):
        x = nn.functional.gelu(self.lift(x))
        return self.project(x + nn.functional.gelu(self.middle(x)))[:, 0]


class Trainer:
    def __init__(self, checkpoint_path):
        self.checkpoint_path = checkpoint_path
        self.model = Surrogate()
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=5e-3)
        total = EPOCHS * len(train_dataloader)
        warmup = total // 10
        self.lr_scheduler = torch.optim.lr_scheduler.LambdaLR(
            self.optimizer, lambda n: min((n + 1) / warmup, 0.5 + 0.5 * math.cos(math.pi * min(1, n / total)))
        )
        self.starting_epoch = 1
        if os.path.exists(checkpoint_path):
            self.load_checkpoint()

    def save_model(self, epoch):
        state = {"epoch": epoch, "model_state_dict": self.model.state_dict(), "optimizer_state_dict": self.optimizer.state_dict()}
        if FIXED:
            state["lr_scheduler_state_dict"] = self.lr_scheduler.state_dict()
        torch.save(state, self.checkpoint_path)

    def load_checkpoint(self):
        checkpoint = torch.load(self.checkpoint_path, weights_only=True)
        self.model.load_state_dict(checkpoint["model_state_dict"])
        self.optimizer.load_state_dict(checkpoint["optimizer_state_dict"])
        if FIXED:
            self.lr_scheduler.load_state_dict(checkpoint["lr_scheduler_state_dict"])
        self.starting_epoch = checkpoint["epoch"] + 1

    def train(self, last_epoch):
        for epoch in range(self.starting_epoch, last_epoch + 1):
            total = 0.0
            for x, y in train_dataloader:
                loss = nn.functional.mse_loss(self.model(x), y)
                self.optimizer.zero_grad()
                loss.backward()
                self.optimizer.step()
                self.lr_scheduler.step()
                total += loss.item() / len(train_dataloader)
            print(f"epoch {epoch}: loss {total:.4f} lr {self.optimizer.param_groups[0]['lr']:.2e}")
            self.save_model(epoch)


with tempfile.TemporaryDirectory() as folder:
    path = os.path.join(folder, "recent.pt")
    Trainer(path).train(INTERRUPTED_AFTER)
    Trainer(path).train(EPOCHS)
