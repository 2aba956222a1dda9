"""The encoder's weights never move: an in-place kernel loses its result where memory is not contiguous.

On Apple's MPS backend `addcmul_` and `addcdiv_` computed into a contiguous copy of their output and, where the output itself was not
contiguous, did not copy back. Adam makes its moments like the weights; an encoder that starts as the decoder's transpose has weights,
moments and updates in transposed memory, and stood still, while everything else learned. The loss reached a plateau that looked like bad
hyperparameters (E. Simon, "the bug that taught me more about PyTorch than years of using it", 2025). Here the kernel is written out for
the CPU: a sparse autoencoder with an optimizer that calls it. Repair: copy back.

Thread: https://github.com/pytorch/pytorch/issues/118115
Condition: update-not-applied
"""

import sys

import torch
from torch import nn
from torch.nn import functional as F

FIXED = "fixed" in sys.argv[1:]
STEPS, BATCH, WIDTH, FEATURES = 60, 64, 32, 96


def kernel(out, tensor1, tensor2, value, combine):
    """out += value * combine(tensor1, tensor2), as the backend did it: into a contiguous buffer."""
    result = out if out.is_contiguous() else out.contiguous()
    result.add_(combine(tensor1, tensor2), alpha=value)
    if FIXED and result is not out:
        out.copy_(result)


class Adam(torch.optim.Optimizer):
    def __init__(self, params, lr=1e-3, betas=(0.9, 0.999), eps=1e-8):
        super().__init__(params, {"lr": lr, "betas": betas, "eps": eps})

    @torch.no_grad()
    def step(self, closure=None):
        for group in self.param_groups:
            beta1, beta2 = group["betas"]
            for p in group["params"]:
                if p.grad is None:
                    continue
                state = self.state[p]
                if not state:
                    state["step"] = 0
                    state["exp_avg"] = torch.zeros_like(p)
                    state["exp_avg_sq"] = torch.zeros_like(p)
                state["step"] += 1
                exp_avg, exp_avg_sq = state["exp_avg"], state["exp_avg_sq"]
                exp_avg.lerp_(p.grad, 1 - beta1)
                exp_avg_sq.mul_(beta2)
                kernel(exp_avg_sq, p.grad, p.grad, 1 - beta2, torch.mul)
                step_size = group["lr"] / (1 - beta1 ** state["step"])
                denominator = (exp_avg_sq / (1 - beta2 ** state["step"])).sqrt().add_(group["eps"])
                kernel(p, exp_avg, denominator, -step_size, torch.div)


class SparseAutoencoder(nn.Module):
    def __init__(self):
        super().__init__()
        self.decoder = nn.Linear(FEATURES, WIDTH)
        self.encoder = nn.Linear(WIDTH, FEATURES)
        self.encoder.weight.data = self.decoder.weight.data.clone().T

    def forward(self, x):
        features = F.relu(self.encoder(x - self.decoder.bias))
        return self.decoder(features), features


torch.manual_seed(0)
directions = F.normalize(torch.randn(FEATURES, WIDTH), dim=1)
model = SparseAutoencoder()
optimizer = Adam(model.parameters(), lr=2e-3)

for step in range(STEPS):
    active = (torch.rand(BATCH, FEATURES) < 0.05).float() * torch.rand(BATCH, FEATURES)
    x = active @ directions
    reconstruction, features = model(x)
    loss = F.mse_loss(reconstruction, x) + 1e-4 * features.abs().sum(1).mean()
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
    if step % 20 == 19:
        print(f"step {step + 1}: loss {loss.item():.4f}")
