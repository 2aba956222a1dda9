"""Batches that are not of the size their loader was made for."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor
from torch.utils.data import DataLoader

from sickbay.core.record import RecordWriter
from sickbay.patient import Patient, tensors_in
from sickbay.probes.loop import Loop
from sickbay.probes.unseen import unseen

SIGNALS = ("batch_rows",)

_LOADERS = 16  # sizes that are remembered
_WRITTEN = 64  # readings of batches of another size


class BatchSizes:
    """Writes how many rows a training step's first batch had, and how many its loader promised: the first time and where they differ."""

    SIGNALS = SIGNALS

    def __init__(self, patient: Patient, record: RecordWriter, loop: Loop) -> None:
        self.patient, self.record, self.loop = patient, record, loop
        self._promised: list[int] = []
        self._usual: dict[tuple[int, ...], int] = {}
        self._seen = 0
        self._written = 0
        self._step = -1

    def backward_begin(self, loss: Tensor | None, kind: str) -> None:
        step = self.record.step
        if step == self._step or not self._promised or kind == "func":
            return
        self._step = step
        calls = [call for call in self.patient.training_calls() if not call.spent]
        shape = next((tuple(t.shape) for _, t in tensors_in((calls[0].args, calls[0].kwargs)) if t.dim() > 1), None) if calls else None
        if not shape:
            return
        self._seen += 1
        first = self._usual.setdefault(shape[1:], shape[0]) if len(self._usual) < _LOADERS else self._usual.get(shape[1:], shape[0])
        # Of sequences of many lengths only the first dimension stays: it counts as rows where a loader has promised that number.
        usual = first if first in self._promised else max(self._usual.values(), key=list(self._usual.values()).count)
        if usual in self._promised and (shape[0] != usual or not self._written) and self._written < _WRITTEN:
            self._written += 1
            self.record.read("batch_rows", shape[0], note={"promised": usual, "batches": self._seen}, source=calls[0].source)

    def around_loader(self, original: Any) -> Any:
        @unseen
        def __init__(loader: Any, *args: Any, **kwargs: Any) -> None:
            original(loader, *args, **kwargs)
            if self.loop.awake():
                with self.loop.sheltered("loader", self):
                    size = loader.batch_size
                    if isinstance(size, int) and size > 1 and size not in self._promised and len(self._promised) < _LOADERS:
                        self._promised.append(size)

        return __init__


def attach(patient: Patient, record: RecordWriter, loop: Loop) -> Callable[[], None]:
    """From now on a training batch's rows are held against what loaders promise."""
    probe = BatchSizes(patient, record, loop)
    loop.on("backward_begin", probe, probe.backward_begin)
    loop.sleeps(probe)
    loop.replace(DataLoader, "__init__", probe.around_loader)
    return lambda: None
