"""Counts which rows of the largest embedding the data ever ask for."""

from __future__ import annotations

import weakref
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from sickbay.core.record import RecordWriter
from sickbay.patient import ForwardCall, Patient, bare, tensors_in
from sickbay.probes.gradients import clean
from sickbay.probes.loop import Loop

SIGNALS = ("vocabulary_used",)

_ROWS = 512  # fewer rows are no burden
_MOST_ROWS = 4_000_000
_FIRST = 4  # steps until the first count; it doubles from there on
_ALL = 16  # first steps, all of which are counted
_EVERY = 4  # steps between counts after them
_WHOLE = (torch.int64, torch.int32)


class Vocabulary:
    """Writes, at steps 4, 8, 16 and so on, the share of the embedding's rows that has come in the data."""

    SIGNALS = SIGNALS

    def __init__(self, patient: Patient, record: RecordWriter, loop: Loop) -> None:
        self.patient, self.record = patient, record
        self._root: weakref.ref[nn.Module] | None = None
        self._name = ""
        self._rows = 0
        self._note: dict[str, Any] = {}
        self._seen: Tensor | None = None
        self._tokens = 0
        self._steps = 0
        self._due = _FIRST
        self._before = 0

    def forward_end(self, call: ForwardCall, output: Any) -> None:
        if not call.grad_enabled or (self._steps >= _ALL and self._steps % _EVERY):
            return
        if self._root is None or self._root() is not call.module:
            if self._root is not None and self._root() is not None and self._tokens:
                return  # the first model that was trained is the one that is judged
            self._root = weakref.ref(call.module)
            self._choose(bare(call.module))
        if self._rows:
            for _, tensor in tensors_in((call.args, call.kwargs)):
                self._count(tensor)

    def _choose(self, root: nn.Module) -> None:
        tables = [(name, part) for name, part in root.named_modules() if isinstance(part, nn.Embedding)]
        name, table = max(tables, key=lambda entry: entry[1].weight.shape[0], default=("", None))
        if table is None or not _ROWS <= table.weight.shape[0] <= _MOST_ROWS:
            return
        weight = table.weight
        heads = [
            (part_name, part.weight)
            for part_name, part in root.named_modules()
            if isinstance(part, nn.Linear) and part.weight.shape[0] == weight.shape[0] and part.weight is not weight
        ]
        tied = any(isinstance(part, nn.Linear) and part.weight is weight for _, part in root.named_modules())
        mine = [weight, *(head for _, head in heads)]
        total = sum(parameter.numel() for parameter in root.parameters())
        self._name, self._rows = clean(f"{name}.weight"), weight.shape[0]
        self._seen = torch.zeros(self._rows, dtype=torch.bool, device=weight.device)
        self._note = {
            "rows": self._rows,
            "share": sum(w.numel() for w in mine) / max(total, 1),
            "weight_bytes": sum(w.nbytes for w in mine),
            "trained": all(w.requires_grad for w in mine),
            "head": clean(heads[0][0]) if heads else "",
            "tied": tied,
        }

    def _count(self, tensor: Tensor) -> None:
        if self._seen is None or tensor.dtype not in _WHOLE or tensor.dim() == 0 or tensor.device != self._seen.device:
            return
        ids = tensor.detach().flatten()
        # A row too many counts as seen where ids are no ids (-100, positions): that only hides, it never accuses.
        self._seen[ids.clamp(0, self._rows - 1)] = True
        self._tokens += ids.numel()

    def round_end(self, step: int) -> None:
        self._steps = step + 1
        if self._steps >= self._due:
            self._due *= 2
            self._write()

    def _write(self) -> None:
        if self._seen is None or not self._tokens:
            return
        seen = int(self._seen.sum())
        note = {**self._note, "seen": seen, "tokens": self._tokens, "new_late": (seen - self._before) / max(seen, 1), "steps": self._steps}
        self._before = seen
        self.record.read("vocabulary_used", seen / self._rows, where=self._name, note=note)


def attach(patient: Patient, record: RecordWriter, loop: Loop) -> Callable[[], None]:
    """From now on the ids in the data are counted."""
    probe = Vocabulary(patient, record, loop)
    for event in ("forward_end", "round_end"):
        loop.on(event, probe, getattr(probe, event))
    loop.rests(probe)
    return lambda: None
