"""The norms of many tensors for the price of one look."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


def norms_of(tensors: list[Tensor], extra: list[Tensor]) -> list[float]:
    """The fp32 L2 norms of `tensors` followed by the scalars `extra`, with one host transfer per device."""
    found: list[float] = [0.0] * (len(tensors) + len(extra))
    by_device: dict[Any, list[int]] = {}
    for index, tensor in enumerate(tensors):
        by_device.setdefault((tensor.device, tensor.dtype), []).append(index)
    for (_, dtype), indices in by_device.items():
        wide = torch.float32 if dtype in (torch.float16, torch.bfloat16) else None
        group = [tensors[i].detach() for i in indices]
        norms = torch._foreach_norm(group, 2, dtype=wide) if wide else torch._foreach_norm(group, 2)
        for index, value in zip(indices, torch.stack(norms).tolist()):
            found[index] = value
    for index, value in enumerate(extra):
        found[len(tensors) + index] = value.item()
    return found
