"""The loss scale falls to nothing: gradients are summed over frames and workers in float16, and averaged afterwards.

The loss was a sum over the frames of a batch, divided by their number late. In float16 the sum overflowed, most of all in speech with its
many frames; each overflow skipped the step and halved the scale, until "Minimum loss scale reached (0.0001)". An earlier version had
averaged at once, and had overflowed less. The hook that sends gradients in float16 to the other workers had the same order, sum and then
divide, and was turned round to avoid inf. Repair: average before. Here the sum over workers is a multiple of one worker's gradients.

Thread: https://github.com/facebookresearch/fairseq/issues/4555
Thread: https://github.com/pytorch/pytorch/pull/57410
Condition: scaler-collapse
Also: half-precision-overflow
"""

import sys

import torch
from torch import nn
from torch.nn import functional as F

FIXED = "fixed" in sys.argv[1:]
STEPS, UTTERANCES, FRAMES, FEATURES, PHONES, WORKERS = 60, 32, 320, 16, 12, 128


class Acoustic(nn.Module):
    def __init__(self):
        super().__init__()
        self.convolution = nn.Conv1d(FEATURES, 48, 5, padding=2)
        self.norm = nn.LayerNorm(48)
        self.output = nn.Linear(48, PHONES)

    def forward(self, x):
        return self.output(F.relu(self.norm(self.convolution(x.transpose(1, 2)).transpose(1, 2))))


def all_reduce(parameters, sample_size):
    """Gradients become the mean over the frames of all workers, sent in float16."""
    for parameter in parameters:
        if FIXED:
            parameter.grad = ((parameter.grad / sample_size).half() * WORKERS).float()
        else:
            parameter.grad = (parameter.grad.half() * WORKERS).float() / sample_size


def get_batch():
    phones = torch.randint(PHONES, (UTTERANCES, FRAMES // 8)).repeat_interleave(8, 1)
    return prototypes[phones] + 0.5 * torch.randn(UTTERANCES, FRAMES, FEATURES), phones


torch.manual_seed(0)
prototypes = torch.randn(PHONES, FEATURES)
model = Acoustic()
optimizer = torch.optim.Adam(model.parameters(), lr=2e-3)
scaler = torch.amp.GradScaler("cpu")
frames = UTTERANCES * FRAMES

for step in range(STEPS):
    x, y = get_batch()
    loss = F.cross_entropy(model(x).flatten(0, 1), y.flatten(), reduction="sum")
    optimizer.zero_grad()
    scaler.scale(loss).backward()
    all_reduce(model.parameters(), frames * WORKERS)
    scaler.step(optimizer)
    scaler.update()
    if step % 15 == 14:
        print(f"step {step + 1}: loss {loss.item() / frames:.3f} scale {scaler.get_scale():g}")
