"""The distance of two equal samples is 0, and the derivative of the square root there is infinite.

A contrastive loss takes the root of squared distances. The loss is an ordinary number; when a pair happens to consist of two equal samples,
its gradient is NaN, and after one step so are the weights: "the derivatives suddenly equaled to nan in some iteration". Repair: a small
number under the root.

Thread: https://github.com/adambielski/siamese-triplet/issues/18
Condition: log-of-zero
"""

import sys

import torch
from torch import nn
from torch.nn import functional as F

FIXED = "fixed" in sys.argv[1:]
CLASSES, SAMPLES, BATCH, STEPS = 10, 400, 24, 90


class ContrastiveLoss(nn.Module):
    def __init__(self, margin):
        super().__init__()
        self.margin, self.eps = margin, 1e-9 if FIXED else 0.0

    def forward(self, output1, output2, target):
        distances = (output2 - output1).pow(2).sum(1)
        losses = 0.5 * (target * distances + (1 - target) * F.relu(self.margin - (distances + self.eps).sqrt()).pow(2))
        return losses.mean()


class EmbeddingNet(nn.Module):
    def __init__(self):
        super().__init__()
        self.convnet = nn.Sequential(nn.Conv2d(1, 12, 3), nn.PReLU(), nn.MaxPool2d(2), nn.Conv2d(12, 24, 3), nn.PReLU())
        self.fc = nn.Sequential(nn.Linear(24 * 3 * 3, 48), nn.PReLU(), nn.Linear(48, 4))

    def forward(self, x):
        return self.fc(self.convnet(x).flatten(1))


torch.manual_seed(2)
drawings = (torch.rand(CLASSES, 1, 12, 12) < 0.4).float()
labels = torch.randint(CLASSES, (SAMPLES,))
images = drawings[labels] + 0.2 * torch.randn(SAMPLES, 1, 12, 12)

model = EmbeddingNet()
criterion = ContrastiveLoss(margin=1.0)
optimizer = torch.optim.Adam(model.parameters(), lr=1e-3)
for step in range(STEPS):
    first = torch.randint(SAMPLES, (BATCH,))
    second = torch.empty_like(first)
    target = torch.arange(BATCH) % 2
    for number, (index, same) in enumerate(zip(first, target.bool(), strict=True)):
        candidates = ((labels == labels[index]) == same).nonzero().flatten()
        second[number] = candidates[torch.randint(len(candidates), ())]
    loss = criterion(model(images[first]), model(images[second]), target.float())
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
    if step % 15 == 14:
        print(f"step {step + 1}: loss {loss.item():.4f}")
