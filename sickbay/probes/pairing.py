"""Whether inputs and targets belong together: the loss of the true pairs against that of pairs put together anew, on the run's own outputs.

Nothing is run again: the same outputs are scored a second time, with each row's targets taken from the row before.
"""

from __future__ import annotations

import math
import zlib
from collections import Counter
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from sickbay.core.independence import dependence_z
from sickbay.core.record import RecordWriter
from sickbay.patient import LossCall, Patient, tensors_in
from sickbay.probes.examples import Examples
from sickbay.probes.loop import Loop
from sickbay.probes.purse import Purse

SIGNALS = ("pairing_gain", "input_conflicts", "input_dependence")

SHARE = 0.0015  # of the run's time
FIRST = 0.05  # seconds: some hundred looks, so that a run of seconds is seen as well


def _squares(output: Tensor, target: Tensor) -> Tensor:
    return (output - target) ** 2


def _distances(output: Tensor, target: Tensor) -> Tensor:
    return (output - target).abs()


def _logistic(logit: Tensor, target: Tensor) -> Tensor:
    return logit.clamp(min=0) - logit * target + (-logit.abs()).exp().log1p()


# Written out, since torch's own functions are watched, and a call from here would count as one of the script's.
_ELEMENTWISE: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "mse_loss": _squares,
    "l1_loss": _distances,
    "smooth_l1_loss": _distances,
    "huber_loss": _distances,
    "binary_cross_entropy_with_logits": _logistic,
}
_MAX_ELEMENTS = 1 << 17  # of the outputs scored again in one look
_MAX_MARKS = 1 << 16  # rows remembered
_MARKED = 1024  # bytes of a row's input that tell it from others
_ANSWERS = ("labels", "label", "targets", "target")  # how models that make their own loss call what is to be told
_FEWEST_ROWS = 4
_FEWEST_EXAMPLES = 200
_SURE = 4.0  # standard errors: inputs that tell the model this much need no further test


class Pairing:
    """Writes what the true pairing is worth at sampled steps, and at the end whether inputs repeat with other targets or tell nothing."""

    SIGNALS = SIGNALS

    def __init__(self, patient: Patient, record: RecordWriter, loop: Loop) -> None:
        self.patient, self.record = patient, record
        self._purse = Purse(SHARE, FIRST)
        self._evaluation_purse = Purse(SHARE / 4, FIRST / 5)  # so that something is left for what comes late
        self._rows: tuple[int, int] | None = None
        self._last: dict[int, float] = {}
        self._targets: Counter[float] = Counter()
        self._seen = 0
        self._repeats = 0
        self._conflicts = 0.0
        self._moments = [0.0, 0.0]
        self._examples = Examples()
        self._gains: list[tuple[float, float]] = []
        self._source = ""
        self._classes = True

    # --- events -----------------------------------------------------------------------------------------------------
    def backward_begin(self, loss: Tensor | None, kind: str) -> None:
        if not self._purse.affords():
            return
        losses = [call for call in self.patient.losses if call.grad_enabled and not call.spent]
        if len(losses) != 1:
            return
        calls = [call for call in self.patient.training_calls() if not call.spent]
        with self._purse.paying():
            inputs = [
                tensor
                for call in calls
                for name, tensor in tensors_in((call.args, call.kwargs))
                if tensor.dim() and not name.endswith(_ANSWERS) and not _same(tensor, losses[0].targets)
            ]
            scored = self._scored(losses[0], inputs)
            if scored is not None:
                self._training(losses[0], *scored)

    def loss(self, call: LossCall) -> None:
        """An evaluation's outputs are scored by the rows that training's were."""
        if call.grad_enabled or self._rows is None or not self.record.step or not self._evaluation_purse.affords():
            return
        with self._evaluation_purse.paying():
            count = call.targets.numel() // self._rows[1]
            scores = gains(call, count, self._rows[1]) if count * self._rows[1] == call.targets.numel() else None
            if scores is not None:
                self._write("evaluation", *scores, call.source)

    def finish(self) -> None:
        if not self._seen:
            return
        marginal = self._differing()
        if not self._classes:  # squares count as shares of the targets' variance
            self._conflicts, marginal = (self._conflicts / marginal, 1.0) if marginal > 0 else (0.0, 0.0)
        rate = self._conflicts / self._repeats if self._repeats else 0.0
        note = {"rows": self._seen, "repeats": self._repeats, "inputs": len(self._last), "rate": rate, "marginal": marginal}
        self.record.read("input_conflicts", self._conflicts / self._seen, note=note, source=self._source)
        weight = sum(1 / error**2 for _, error in self._gains if error)
        told = sum(gain / error**2 for gain, error in self._gains if error) / weight * math.sqrt(weight) if weight else 0.0
        if len(self._examples) >= _FEWEST_EXAMPLES and told < _SURE and not self._examples.continues:
            x, y = self._examples.features(), self._examples.targets()
            note = {"rows": len(x), "noise": self._examples.look_made_up(), "columns": self._examples.columns()}
            self.record.read("input_dependence", dependence_z(x, y), note=note, source=self._source)

    # --- one batch ----------------------------------------------------------------------------------------------------
    def _scored(self, call: LossCall, inputs: list[Tensor]) -> tuple[int, int, list[Tensor], Any] | None:
        """(rows, targets in a row, inputs, (gain, rolled loss) of each row); None where rows cannot be told apart or need not be."""
        if call.targets.device.type != "cpu" or call.reduction not in ("mean", "sum") or not call.targets.numel() or not inputs:
            return None
        count = call.targets.shape[0]
        if not any(_has_rows(tensor, count) for tensor in inputs):
            flat = call.classifies and call.targets.dim() == 1
            sizes = [tensor.shape[0] for tensor in inputs if flat and tensor.dim() > 1 and count % tensor.shape[0] == 0]
            if not sizes:
                return None  # the model is called on one row at a time, or on rows that targets have no share of each
            count = sizes[0]
        if count < _FEWEST_ROWS:
            return None
        width = call.targets.numel() // count
        scores = gains(call, count, width)
        return None if scores is None else (count, width, inputs, scores)

    def _training(self, call: LossCall, count: int, width: int, inputs: list[Tensor], scores: tuple[Any, Any]) -> None:
        self._rows, self._source = (count, width), call.source
        self._classes = call.classifies
        gain, rolled = scores
        # One input may be asked several questions, each with a loss of its own.
        question = zlib.crc32(f"{call.name} {call.logits.shape[1:]} {call.source}".encode())
        marks = [mark ^ question for mark in row_marks(inputs, count, len(gain))]
        targets = call.targets.detach().reshape(count, width)[: len(gain)]
        fresh = np.array([mark not in self._last for mark in marks])
        self._examples.add(inputs, targets, fresh, count, self._classes, call.ignore_index)
        self._compare(marks, self._summaries(targets, call.ignore_index))
        for where, chosen in (("fresh", fresh), ("repeated", ~fresh)):
            if chosen.sum() >= _FEWEST_ROWS:
                self._write(where, gain[chosen], rolled[chosen], call.source)

    def _summaries(self, targets: Tensor, ignored: int) -> list[float]:
        """One number per row that two rows with the same targets share: a class, or the mean of a regression's targets."""
        if not self._classes:
            return [float(value) for value in targets.double().mean(1)]
        counted = targets != ignored
        first = counted.int().argmax(1)
        return [float(value) for value in targets[torch.arange(len(targets)), first]]

    def _compare(self, marks: list[int], summaries: list[float]) -> None:
        """Each row with the last one of the same input: how far apart are their targets?"""
        for mark, target in zip(marks, summaries):
            before = self._last.get(mark)
            self._seen += 1
            if before is not None:
                self._repeats += 1
                self._conflicts += float(before != target) if self._classes else (before - target) ** 2 / 2
            if before is not None or len(self._last) < _MAX_MARKS:
                self._last[mark] = target
            if self._classes:
                self._targets[target] += 1
            else:
                self._moments = [self._moments[0] + target, self._moments[1] + target**2]

    def _differing(self) -> float:
        """What `_compare` would add, on average, for two rows at random."""
        if self._classes:
            return 1.0 - sum((times / self._seen) ** 2 for times in self._targets.values())
        return max(0.0, self._moments[1] / self._seen - (self._moments[0] / self._seen) ** 2)

    def _write(self, where: str, gain: NDArray[np.float64], rolled: NDArray[np.float64], source: str) -> None:
        level = float(np.abs(rolled).mean())
        if not (0 < level < math.inf) or len(gain) < _FEWEST_ROWS:
            return
        value, error = float(gain.mean()) / level, float(gain.std()) / math.sqrt(len(gain)) / level
        if where == "fresh":
            self._gains.append((value, max(error, 1e-6)))
        self.record.read("pairing_gain", value, where=where, note={"rows": len(gain), "error": error}, source=source)


def gains(call: LossCall, count: int, width: int) -> tuple[NDArray[np.float64], NDArray[np.float64]] | None:
    """(loss with the targets of the row before minus true loss, the former) for the first rows `(n,)`; None where it cannot tell.

    `count` rows of `width` targets each. As many rows as make up 2**17 outputs are scored.
    """
    logits, targets = call.logits, call.targets.detach()
    if logits.is_meta or logits.device.type != "cpu" or targets.device.type != "cpu":
        return None
    if call.by_class and logits.dim() >= 2:
        classes = logits.shape[1]
        if width == 1 and classes == count and targets.unique().numel() == count:
            return None  # contrastive: a target is a place in the batch
        few = min(count, max(_FEWEST_ROWS, _MAX_ELEMENTS // max(1, width * classes)))
        outputs = logits.detach().movedim(1, -1).reshape(count, width, classes)[:few].float()
        if width * few * classes > 8 * _MAX_ELEMENTS:
            outputs = outputs[:, -max(1, _MAX_ELEMENTS // (few * classes)) :]
        wanted = targets.reshape(count, width)[:few, -outputs.shape[1] :]
        counted = wanted != call.ignore_index
        other = _moved(wanted, counted)
        counted &= other != call.ignore_index
        logs = outputs.log_softmax(-1) if call.name == "cross_entropy" else outputs
        true, moved = (-logs.gather(-1, ids.clamp(0, classes - 1).unsqueeze(-1)).squeeze(-1) for ids in (wanted, other))
        different = (wanted != other) & counted
    elif call.name in _ELEMENTWISE and logits.shape == targets.shape and logits.is_floating_point():
        few = min(count, max(_FEWEST_ROWS, _MAX_ELEMENTS // width))
        outputs, wanted = (part.detach().reshape(count, width)[:few].float() for part in (logits, targets))
        other = wanted.roll(1, 0)
        true, moved = (_ELEMENTWISE[call.name](outputs, ids) for ids in (wanted, other))
        counted, different = torch.ones_like(wanted, dtype=torch.bool), wanted != other
    else:
        return None
    share = counted.sum(1)
    kept = share > 0
    if not bool(different.any()) or int(kept.sum()) < _FEWEST_ROWS:
        return None
    true, moved = ((part * counted).sum(1)[kept].double() / share[kept] for part in (true, moved))
    return (moved - true).numpy(), moved.numpy()


def _moved(targets: Tensor, counted: Tensor) -> Tensor:
    """`targets` `(n, K)` of the row before; where few are counted, as of masked tokens, the counted ones of half a batch before."""
    if not 0 < int(counted.sum()) < counted.numel() / 2:
        return targets.roll(1, 0)
    other = targets.clone()
    chosen = targets[counted]
    other[counted] = chosen.roll(len(chosen) // 2)
    return other


def _has_rows(tensor: Tensor, count: int) -> bool:
    """True if `tensor` holds `count` rows, or has time before them; as many positions of a single row are none."""
    return tensor.shape[0] == count or (tensor.dim() > 1 and tensor.shape[1] == count and tensor.shape[0] > 1)


def row_marks(inputs: list[Tensor], count: int, few: int) -> list[int]:
    """A checksum for each of the first `few` rows of the inputs: equal inputs have equal ones."""
    common = 0
    columns: list[NDArray[Any]] = []
    for tensor in inputs[:8]:
        tensor = tensor.detach()
        if tensor.device.type != "cpu":
            continue
        if tensor.dim() > 1 and tensor.shape[0] != count and tensor.shape[1] == count:
            tensor = tensor.transpose(0, 1)
        whole = tensor if tensor.shape[0] == count else tensor.reshape(1, -1)
        rows = whole[:few].reshape(min(few, len(whole)), -1)
        if not rows.shape[1]:
            continue
        stride = max(1, rows.shape[1] * rows.element_size() // _MARKED)
        part = rows[:, ::stride]
        part = part + 0.0 if part.is_floating_point() else part  # -0.0 is 0.0
        taken = part.clone(memory_format=torch.contiguous_format).view(torch.uint8).numpy()  # one column of one row keeps its stride
        if len(whole) == count:
            columns.append(taken)
        else:
            common = zlib.crc32(taken.tobytes(), common)
    marks = [common] * few
    for taken in columns:
        marks = [zlib.crc32(row.tobytes(), mark) for row, mark in zip(taken, marks)]
    return marks


def _same(tensor: Tensor, targets: Tensor) -> bool:
    """True if `tensor` is the targets themselves, or what they are cut from while being made for the loss alone."""
    return tensor.untyped_storage().data_ptr() == targets.untyped_storage().data_ptr() and tensor.shape == targets.shape


def attach(patient: Patient, record: RecordWriter, loop: Loop) -> Callable[[], None]:
    """From now on the pairing of inputs and targets is looked at in sampled steps."""
    probe = Pairing(patient, record, loop)
    loop.on("backward_begin", probe, probe.backward_begin)
    loop.on("loss", probe, probe.loss)
    loop.on("finish", probe, probe.finish)
    loop.sleeps(probe)
    return lambda: None
