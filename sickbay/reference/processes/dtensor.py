"""Tensors of which each process holds a part, and those it holds whole, asked alike. Importing torch's DTensor takes a second: not here."""

from __future__ import annotations

from typing import Any

from torch import Tensor


def is_dtensor(tensor: Tensor) -> bool:
    """Whether the processes hold `tensor` together, each a part of it or a copy."""
    return hasattr(tensor, "placements")


def dealt_axis(tensor: Tensor) -> int | None:
    """The axis along which `tensor` is dealt out to the processes, None = each holds all of it."""
    if not is_dtensor(tensor):
        return None
    distributed: Any = tensor
    (placement,) = distributed.placements
    return int(placement.dim) if placement.is_shard() else None


def local(tensor: Tensor) -> Tensor:
    """What of `tensor` is here, sharing its memory."""
    distributed: Any = tensor
    here: Tensor = distributed.to_local() if is_dtensor(tensor) else tensor
    return here


def gathered(tensor: Tensor) -> Tensor:
    """All of `tensor`, in every process. Each of them calls this."""
    distributed: Any = tensor
    whole: Tensor = distributed.full_tensor() if is_dtensor(tensor) else tensor
    return whole


def dealt_like(pattern: Tensor, whole: Tensor) -> Tensor:
    """`whole`, which every process holds alike, dealt out as `pattern` is; nothing is sent."""
    if not is_dtensor(pattern):
        return whole
    from torch.distributed.tensor import distribute_tensor

    distributed: Any = pattern
    dealt: Tensor = distribute_tensor(whole, distributed.device_mesh, distributed.placements, src_data_rank=None)
    return dealt
