"""How much arithmetic a training step takes, and how much this machine can do."""

from __future__ import annotations

import time

import torch
from torch import nn

from sickbay.reference.models.config import Config

PEAK_SIDE = 1024  # of the matrices multiplied to measure the peak: their three fit in a cache of 12 MB
PEAK_SECONDS = 0.3


def training_flops_per_token(model: nn.Module, config: Config) -> float:
    """Floating-point operations of forward and backward for one token of a full row: 6 N + 12 L T D (Chowdhery et al. 2022, appendix B).

    N: weights that multiply every token, which a looked-up embedding does not unless it is the head too.
    """
    weights = {id(weight): weight.numel() for module in model.modules() if isinstance(module, nn.Linear) for weight in (module.weight,)}
    return 6.0 * sum(weights.values()) + 12.0 * config.num_layers * config.context * config.dim


def measured_peak(device: str = "cpu", dtype: torch.dtype = torch.float32, seconds: float = PEAK_SECONDS) -> float:
    """FLOP/s of this machine's best square matrix product, as torch multiplies now (threads, dtype), by trying for `seconds`."""
    left = torch.randn(PEAK_SIDE, PEAK_SIDE, device=device).to(dtype)
    right, out = left.clone(), torch.empty_like(left)
    torch.mm(left, right, out=out)
    best = 0.0
    deadline = time.perf_counter() + seconds
    while time.perf_counter() < deadline or not best:
        if left.is_cuda:
            torch.cuda.synchronize(device)
        began = time.perf_counter()
        torch.mm(left, right, out=out)
        if left.is_cuda:
            torch.cuda.synchronize(device)
        best = max(best, 2.0 * PEAK_SIDE**3 / (time.perf_counter() - began))
    return best
