"""After the first validation the network stays in evaluation mode: its dropout is off for the rest of the epoch.

A segmentation trainer validates every few iterations, in the middle of an epoch; `validate` calls `model.eval()`, and `model.train()` is
called only at the start of an epoch. The same was found in an image-text retrieval model, whose authors saw results change noticeably when
it was mended, and in others. Nothing raises. Repair: return to training mode at the end of `validate`.

Thread: https://github.com/wkentaro/pytorch-fcn/pull/56
Thread: https://github.com/fartashf/vsepp/issues/4
Condition: eval-mode-in-training
"""

import sys

import torch
from torch import nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, Dataset

FIXED = "fixed" in sys.argv[1:]


class Shapes(Dataset):
    """Noisy 16 x 16 images with a bright rectangle; the label of a pixel is whether it lies in it."""

    def __init__(self, count, seed):
        generator = torch.Generator().manual_seed(seed)
        self.images, self.labels = torch.empty(count, 1, 16, 16), torch.zeros(count, 16, 16, dtype=torch.long)
        self.images.normal_(0, 0.5, generator=generator)
        for image, label, (top, left, height, width) in zip(
            self.images, self.labels, torch.randint(3, 9, (count, 4), generator=generator).tolist(), strict=True
        ):
            label[top - 3 : top - 3 + height, left - 3 : left - 3 + width] = 1
            image[0] += label

    def __len__(self):
        return len(self.images)

    def __getitem__(self, index):
        return self.images[index], self.labels[index]


class FCN(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv1, self.conv2 = nn.Conv2d(1, 12, 3, padding=1), nn.Conv2d(12, 24, 3, padding=1, stride=2)
        self.fc6, self.drop6 = nn.Conv2d(24, 32, 1), nn.Dropout2d(0.3)
        self.score, self.up = nn.Conv2d(32, 2, 1), nn.ConvTranspose2d(2, 2, 4, stride=2, padding=1)

    def forward(self, x):
        x = F.relu(self.conv2(F.relu(self.conv1(x))))
        return self.up(self.score(self.drop6(F.relu(self.fc6(x)))))


class Trainer:
    def __init__(self, model, optimizer, train_loader, val_loader, max_iter, interval_validate):
        self.model, self.optimizer = model, optimizer
        self.train_loader, self.val_loader = train_loader, val_loader
        self.max_iter, self.interval_validate, self.iteration = max_iter, interval_validate, 0

    def validate(self):
        self.model.eval()
        right = total = 0
        with torch.no_grad():
            for data, target in self.val_loader:
                right += (self.model(data).argmax(1) == target).sum().item()
                total += target.numel()
        print(f"iteration {self.iteration}: accuracy {right / total:.3f}")
        if FIXED:
            self.model.train()

    def train_epoch(self):
        self.model.train()
        for data, target in self.train_loader:
            self.optimizer.zero_grad()
            loss = F.cross_entropy(self.model(data), target)
            loss.backward()
            self.optimizer.step()
            self.iteration += 1
            if self.iteration % self.interval_validate == 0:
                self.validate()
            if self.iteration >= self.max_iter:
                break

    def train(self):
        while self.iteration < self.max_iter:
            self.train_epoch()


torch.manual_seed(1)
model = FCN()
trainer = Trainer(
    model,
    torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9, weight_decay=5e-4),
    DataLoader(Shapes(640, 0), batch_size=16, shuffle=True),
    DataLoader(Shapes(64, 1), batch_size=32),
    max_iter=80,
    interval_validate=10,
)
trainer.train()
