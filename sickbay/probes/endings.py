"""Tells an end token that is also the padding from plain padding: the longest row of a batch ends with it as well.

Rows are filled up to the longest of their batch. Padding that only fills leaves that row whole; an id that stands once at its end
too, batch after batch, was put there by whoever made the texts.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from sickbay.core.record import RecordWriter
from sickbay.patient import LossCall, Patient, tensors_in
from sickbay.probes.loop import Loop

SIGNALS = ("eos_targets",)

_STEPS = 32  # that are looked at
_BATCHES = 6  # padded to a multiple of eight, the longest rows of so many lack one place each once in 260,000 runs
_WIDTHS = 2  # of the rows: a width that is always the same says nothing of the longest row
_FEWEST = 8  # targets compared with the tokens they should be
_MATCH = 0.95  # share of counted targets that are the next token: exact by construction, the rest for edited tokens


class Endings:
    """Follows how the rows of next-token batches end, until one shows that their last id is no end token."""

    SIGNALS = SIGNALS

    def __init__(self, patient: Patient, record: RecordWriter) -> None:
        self.patient, self.record = patient, record
        self._over = False
        self._end_id = -1
        self._batches = 0
        self._ends = 0
        self._widths: set[int] = set()
        self._widths_beside: set[int] = set()
        self._alike = True  # every batch of rows beside them ends as they do
        self._before: set[int] = set()

    def backward_begin(self, loss: Tensor | None, kind: str) -> None:
        if self._over or self.record.step >= _STEPS:
            return
        losses = [call for call in self.patient.losses if call.grad_enabled and not call.spent]
        calls = [call for call in self.patient.training_calls() if not call.spent]
        if not losses or not calls or not losses[-1].classifies:
            return
        given = [tensor for _, tensor in tensors_in((calls[-1].args, calls[-1].kwargs))]
        for ids in given:
            rows = answered(ids, losses[-1])
            if rows is not None:
                self._read(*rows, losses[-1])
                self._read_beside([other for other in given if other is not ids])
                return

    def _read(self, ids: Tensor, counted: Tensor, call: LossCall) -> None:
        """One batch: `ids` `(B, T)`, `counted` `(B, T)` where a position is a counted target."""
        end_id, (rows, width) = int(ids[0, -1]), ids.shape
        lengths, inside = ending_runs(ids, end_id)
        shortest, longest = int(lengths.min()), int(lengths.max())
        scored = bool((counted & (ids == end_id)).any())
        if self._end_id not in (-1, end_id) or shortest != 1 or longest == width or inside or scored:
            self._over = True
            return
        self._end_id = end_id
        if longest == 1:  # rows of one length tell nothing
            return
        self._before |= set(ids.gather(1, (width - 1 - lengths)[:, None]).flatten().tolist())
        self._widths.add(width)
        self._batches += 1
        self._ends += rows
        # One and the same id before the run of every row is the end token, and the run is padding.
        widths = max(len(self._widths), len(self._widths_beside) if self._alike else 0)
        if self._batches >= _BATCHES and widths >= _WIDTHS and len(self._before) > 1:
            self._over = True
            note = {"eos_id": end_id, "eos_in_inputs": self._ends, "known_by": "the longest row of each batch ends with it as well"}
            self.record.read("eos_targets", 0, note=note, source=call.source)

    def _read_beside(self, others: list[Tensor]) -> None:
        """Widths of rows beside them that end alike, a source's: where answers are of one width, it may be of many."""
        for ids in others:
            if not self._over and ids.dim() == 2 and _tokens(ids) and int(ids[0, -1]) == self._end_id:
                lengths, inside = ending_runs(ids, self._end_id)
                if int(lengths.min()) == 1 and int(lengths.max()) < ids.shape[1] and not inside:
                    self._widths_beside.add(ids.shape[1])
                else:
                    self._alike = False


def ending_runs(ids: Tensor, end_id: int) -> tuple[Tensor, bool]:
    """(length `(B,)` of the run of `end_id` that ends each row of `ids` `(B, T)`, whether it stands elsewhere than there or first)."""
    hit, width = ids == end_id, ids.shape[1]
    lengths = hit.flip(1).long().cumprod(1).sum(1)
    inside = hit & (torch.arange(width) < width - lengths[:, None])
    return lengths, bool(inside[:, 1:].any())


def answered(ids: Tensor, call: LossCall) -> tuple[Tensor, Tensor] | None:
    """(the whole rows that `ids` are or begin, where they are counted targets), both `(B, T)`; None unless the targets are next tokens."""
    targets = call.targets.detach()
    if not _tokens(ids) or ids.dim() != 2 or ids.shape[1] < 3 or not _tokens(targets):
        return None
    whole = _whole(ids).detach()
    for columns in (ids.shape[1], ids.shape[1] - 1):
        if targets.numel() != len(ids) * columns:
            continue
        following = whole[:, 1 : columns + 1]
        wanted = targets.reshape(len(ids), columns)[:, : following.shape[1]]
        asked = wanted != call.ignore_index
        if int(asked.sum()) >= _FEWEST and float((wanted == following)[asked].float().mean()) >= _MATCH:
            counted = torch.zeros_like(whole, dtype=torch.bool)
            counted[:, 1 : columns + 1] = asked
            return whole, counted
    return None


def _tokens(tensor: Tensor) -> bool:
    return tensor.dtype in (torch.int64, torch.int32) and tensor.device.type == "cpu"


def _whole(ids: Tensor) -> Tensor:
    """The rows that `ids` are cut from, one place longer, where the script cut the last one off to have targets for all; else `ids`."""
    base = ids._base
    if base is None or base.shape != (len(ids), ids.shape[1] + 1) or base.data_ptr() != ids.data_ptr():
        return ids
    return base if base.stride() == ids.stride() else ids


def attach(patient: Patient, record: RecordWriter, loop: Loop) -> Callable[[], None]:
    """From now on the first batches are looked at."""
    probe = Endings(patient, record)
    loop.on("backward_begin", probe, probe.backward_begin)
    loop.rests(probe)
    return lambda: None
