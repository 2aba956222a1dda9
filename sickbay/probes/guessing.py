"""What guessing by frequency would lose: the entropy of the targets that the run has been trained on so far.

Cost: a count of one batch's targets in the first steps and in every eighth later one, some ten microseconds.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from sickbay.core.record import RecordWriter
from sickbay.patient import LossCall, Patient
from sickbay.probes.loop import Loop

SIGNALS = ("frequency_loss",)

_CLOSELY, _EVERY = 16, 8  # steps from the start that are all counted; after them one in so many
_MOST = 1 << 16  # targets of one call
_CLASSES = 4096
_ENOUGH = 20  # targets for each class: the entropy of fewer is too low by more than a fortieth of a nat
_BINARY = ("binary_cross_entropy", "binary_cross_entropy_with_logits")


class Guessing:
    """Counts classes, or how often each column of yes-or-no targets says yes, of the run's only loss."""

    SIGNALS = SIGNALS

    def __init__(self, patient: Patient, record: RecordWriter, loop: Loop) -> None:
        self.record = record
        self._source = ""
        self._several = False
        self._step = -1
        self._counts: Tensor | None = None
        self._rows = 0

    def loss(self, call: LossCall) -> None:
        if not call.grad_enabled or call.evaluating or self._several:
            return
        self._source = self._source or call.source
        self._several = call.source != self._source
        step = self.record.step
        if self._several or step == self._step or (step > _CLOSELY and step % _EVERY):
            return
        self._step = step
        targets = call.targets.detach()
        if targets.device.type != "cpu" or call.reduction not in ("mean", "sum") or not 0 < targets.numel() <= _MOST or call.smoothing:
            return
        value = self._of_classes(call, targets) if not targets.is_floating_point() else self._of_answers(call, targets)
        if value is not None:
            self.record.read("frequency_loss", value, note={"targets": self._rows}, source=call.source)

    def _of_classes(self, call: LossCall, targets: Tensor) -> float | None:
        """The entropy of the classes' frequencies, in nats."""
        classes = call.logits.shape[1] if call.logits.dim() > 1 else 0
        counted = targets[targets != call.ignore_index]
        if not call.classifies or not 1 < classes <= _CLASSES or not counted.numel():
            return None
        share = self._shares(torch.bincount(counted.flatten(), minlength=classes)[:classes].double(), counted.numel(), _ENOUGH * classes)
        return None if share is None else float(_surprise(share).sum())

    def _of_answers(self, call: LossCall, targets: Tensor) -> float | None:
        """The mean over columns of the entropy of yes and no, in nats."""
        if call.name not in _BINARY or targets.shape != call.logits.shape or not bool(((targets == 0) | (targets == 1)).all()):
            return None
        rows = targets.reshape(len(targets), -1) if targets.dim() else targets.reshape(1, 1)
        share = self._shares(rows.double().sum(0), len(rows), _ENOUGH)
        return None if share is None else float((_surprise(share) + _surprise(1 - share)).mean())

    def _shares(self, counts: Tensor, rows: int, fewest: int) -> Tensor | None:
        """How often each came so far, this batch counted; None before `fewest` rows, and of a batch of another kind than those before."""
        if self._counts is not None and self._counts.shape != counts.shape:
            self._several = True
            return None
        self._counts = counts if self._counts is None else self._counts + counts
        self._rows += rows
        return self._counts / self._rows if self._rows >= fewest else None


def _surprise(share: Tensor) -> Tensor:
    """What each share adds to an entropy, in nats; 0 of nothing."""
    return -share * share.clamp_min(1e-300).log()


def attach(patient: Patient, record: RecordWriter, loop: Loop) -> Callable[[], None]:
    """From now on the targets of the run's loss are counted."""
    probe = Guessing(patient, record, loop)
    loop.on("loss", probe, probe.loss)
    loop.rests(probe)
    return lambda: None
