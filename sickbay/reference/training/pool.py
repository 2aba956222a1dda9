"""Buffers used again and again, for caches and temporaries outside autograd.

    pool = Pool()
    with pool.borrow((8, 1024), torch.float32, "cpu") as logits:
        torch.mm(hidden, head.T, out=logits)

A buffer is lent to nobody else while anything still needs it: torch counts who holds a tensor and its memory, and the pool asks.
"""

from __future__ import annotations

import math
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace

import torch
from torch import Tensor

MOST_BYTES = 1 << 28
MOST_WASTE = 2.0  # a free buffer serves a request as long as it is not more than so many times as large

Place = tuple[torch.device, int]  # a device and its stream: a buffer given back may still be written by what is queued there


class StillNeeded(RuntimeError):
    """A borrowed tensor was held by someone else when it came back; it stays theirs and the pool forgets it."""


@dataclass(frozen=True)
class Statistics:
    """`loans` so far; `reused`: those served by a used buffer; `kept`: those whose buffer never came back.

    `free_bytes` lie ready, `peak_lent_bytes` is the most that was ever lent at once.
    """

    loans: int = 0
    reused: int = 0
    kept: int = 0
    free_bytes: int = 0
    peak_lent_bytes: int = 0


class Pool:
    """Keeps at most `most_bytes` of free buffers, the longest unused ones go first. Any thread may borrow."""

    def __init__(self, most_bytes: int = MOST_BYTES) -> None:
        if most_bytes < 0:
            raise ValueError(f"most_bytes is {most_bytes}; it must be at least 0")
        self._most_bytes = most_bytes
        self._free: list[tuple[Place, Tensor]] = []  # longest unused first; each a flat uint8 tensor over a whole buffer
        self._lent_bytes = 0
        self._statistics = Statistics()
        self._lock = threading.Lock()

    @property
    def statistics(self) -> Statistics:
        return self._statistics

    @contextmanager
    def borrow(self, shape: Sequence[int], dtype: torch.dtype = torch.float32, device: torch.device | str = "cpu") -> Iterator[Tensor]:
        """A contiguous tensor of `shape`, its values anything, lent until the end of the block; after it the tensor is empty.

        Raises StillNeeded at the end where a graph, a view, a NumPy array or any other alias still needs it; `clone()` what shall last.
        """
        device = torch.empty(0, device=device).device  # "cuda" becomes "cuda:0"
        place = (device, torch.cuda.current_stream(device).cuda_stream if device.type == "cuda" else 0)
        size = math.prod(shape) * dtype.itemsize
        buffer = self._take(place, size)
        storage = buffer.untyped_storage()
        with torch.inference_mode(False):
            lent = torch.empty(0, dtype=dtype, device=device)
            lent.set_(storage, 0, tuple(shape), contiguous_strides(shape))
        before = holders(lent)
        failed = True
        try:
            yield lent
            failed = False
        finally:
            needed = why_needed(lent, before)
            if needed is None:
                with torch.no_grad():
                    lent.set_()  # type: ignore[call-overload]  # whoever kept the name finds nothing, instead of another's numbers
            self._give_back(place, buffer, needed is None)
        if needed is not None and not failed:
            described = f"{tuple(shape)} {str(dtype).removeprefix('torch.')}"
            raise StillNeeded(f"the borrowed {described} tensor {needed}; it is not lent again: clone() what must outlive the loan")

    def clear(self) -> None:
        """No free buffer is held; those lent out are not touched."""
        with self._lock:
            self._free.clear()
            self._statistics = replace(self._statistics, free_bytes=0)

    def _take(self, place: Place, size: int) -> Tensor:
        with self._lock:
            fitting = [
                index
                for index, (where, buffer) in enumerate(self._free)
                if where == place and size <= buffer.numel() <= max(MOST_WASTE * size, 1)
            ]
            index = min(fitting, key=lambda each: self._free[each][1].numel(), default=None)
            found = None if index is None else self._free.pop(index)[1]
            seen = self._statistics
            if found is not None:
                seen = replace(seen, reused=seen.reused + 1, free_bytes=seen.free_bytes - found.numel())
            self._lent_bytes += size if found is None else found.numel()
            self._statistics = replace(seen, loans=seen.loans + 1, peak_lent_bytes=max(seen.peak_lent_bytes, self._lent_bytes))
        # Made outside the lock: fresh memory can take milliseconds.
        return torch.empty(size, dtype=torch.uint8, device=place[0]) if found is None else found

    def _give_back(self, place: Place, buffer: Tensor, free: bool) -> None:
        with self._lock:
            self._lent_bytes -= buffer.numel()
            if free and buffer.numel() <= self._most_bytes:
                self._free.append((place, buffer))
            held = sum(each.numel() for _, each in self._free)
            while held > self._most_bytes:
                held -= self._free.pop(0)[1].numel()
            self._statistics = replace(self._statistics, free_bytes=held, kept=self._statistics.kept + (not free))


def contiguous_strides(shape: Sequence[int]) -> tuple[int, ...]:
    """Elements from one entry to the next along each dimension."""
    return tuple(math.prod(shape[place + 1 :]) for place in range(len(shape)))


def holders(tensor: Tensor) -> tuple[int, int]:
    """How many hold the tensor (Python's names count as one; a graph that saved it as another), and how many its memory (its aliases)."""
    storage = tensor.untyped_storage()
    return int(tensor._use_count()), int(torch._C._storage_Use_Count(storage._cdata))  # type: ignore[attr-defined]


def why_needed(lent: Tensor, before: tuple[int, int]) -> str | None:
    """What still needs `lent`, which had `before` holders when it was lent; None if nothing does."""
    if lent.requires_grad:
        return "is part of a graph (requires_grad)"
    tensors, memory = holders(lent)
    if memory > before[1]:
        return "has an alias that still lives (a view, a detached tensor or a NumPy array)"
    if tensors > before[0]:
        return "is saved by a graph"
    return None
