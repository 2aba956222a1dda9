"""Would a larger or a smaller step have done better? Tried on a copy: the optimizer's own next step, multiplied, on its own batch.

Asked only where updates are unusually small or large, so an ordinary run pays for a norm of three matrices at a handful of steps.
"""

from __future__ import annotations

import bisect
import contextlib
import math
import statistics
import weakref
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from sickbay.core.record import RecordWriter
from sickbay.exams import fork
from sickbay.exams.asking import Asking
from sickbay.exams.fork import NoAnswer
from sickbay.exams.rebuild import again, as_logits
from sickbay.exams.trace import conditions_of
from sickbay.patient import Patient, bare, tensors_in, user_line

SIGNALS = ("step_gain",)

_SMALL, _LARGE = 3e-4, 0.03  # update over weight, median of the matrices looked at: outside of these the question is asked
# Steps whose update is measured, or the next one that is looked at closely.
_LOOKS = (0, 1, 3, 7, 15, 23, 31, 47, 63, 95, 127, 191, 255, 383, 511, 1023, 2047, 4095)
_FIRST_SMALL = 7  # step after which small updates are asked about: before it, warm-up has hardly begun
_MATRICES, _MAX_ELEMENTS, _MAX_BYTES = 3, 1 << 20, 256 << 20
_LARGER, _SMALLER = (1.0, 10.0, 100.0, 1e3, 1e4), (0.01, 0.1, 1.0)  # multiples of the step
_QUESTIONS, _CHEAP = 3, 0.3  # asked of an optimizer before its share of the run's time counts, if a question takes less seconds than this
_SAME = 0.02  # relative difference up to which the loss computed again is the script's loss
_SECONDS = 20.0


@dataclass
class Seen:
    """What is known of one optimizer since step `first`. `ratio`: its newest measured update, if a question is due because of it."""

    first: int
    looks: int = 0
    questions: int = 0
    seconds: float = 0.0
    ratio: float | None = None
    before: list[tuple[weakref.ref[Tensor], Tensor]] = field(default_factory=list)


class StepSize:
    """Measures the update of a few matrices at a few steps; where it is out of the ordinary, the step after it is tried out on a copy."""

    SIGNALS = SIGNALS

    def __init__(self, patient: Patient, record: RecordWriter, asking: Asking) -> None:
        self.patient, self.record, self.asking = patient, record, asking
        self._seen: weakref.WeakKeyDictionary[Any, Seen] = weakref.WeakKeyDictionary()
        self._given: list[float] = []
        self._due = False  # True while a ratio out of the ordinary waits for its question

    def backward_begin(self, loss: Tensor | None, kind: str) -> None:
        if self._due and loss is not None and loss.numel() == 1:
            self._given.append(float(loss.detach()))

    def step_begin(self, optimizer: Any, late: bool) -> None:
        seen = self._seen.get(optimizer)
        if seen is None:
            seen = self._seen[optimizer] = Seen(self.record.step)
        seen.before = []
        if late or self.patient.scale != 1.0:
            return
        if seen.ratio is not None:
            ratio, seen.ratio = seen.ratio, None
            if self._affordable(seen):
                self._ask(optimizer, ratio)
                seen.questions, seen.seconds = seen.questions + 1, max(seen.seconds, self.asking.cost)
            self._due = any(other.ratio is not None for other in self._seen.values())
        self._given.clear()
        if seen.looks < len(_LOOKS) and self.record.step - seen.first >= _LOOKS[seen.looks]:
            seen.looks = bisect.bisect(_LOOKS, self.record.step - seen.first)
            seen.before = [(weakref.ref(matrix), matrix.detach().clone()) for matrix in _matrices(optimizer)]

    def step_end(self, optimizer: Any) -> None:
        seen = self._seen.get(optimizer)
        if seen is None or not seen.before:
            return
        ratios = []
        for held, before in seen.before:
            now = held()
            size = float(before.norm())
            if now is not None and size > 0:
                ratios.append(float((now.detach() - before).norm()) / size)
        seen.before = []
        if ratios and all(map(math.isfinite, ratios)):
            ratio = statistics.median(ratios)
            if ratio > _LARGE or (0 < ratio < _SMALL and self.record.step - seen.first >= _FIRST_SMALL):
                seen.ratio, self._due = ratio, True

    def _affordable(self, seen: Seen) -> bool:
        return (seen.questions < _QUESTIONS and seen.seconds < _CHEAP) or self.asking.affordable()

    def _ask(self, optimizer: Any, ratio: float) -> None:
        """`step_gain` of the step about to be made; the reason is noted where it cannot be told."""
        given, source = list(self._given), user_line(4)
        multiples = _LARGER if ratio < _SMALL else _SMALLER
        answer = self.asking.ask(lambda: fork.ask(lambda: tried(self.patient, optimizer, multiples, given), _SECONDS))
        if isinstance(answer, NoAnswer):
            self.record.unobserved("step_gain", f"the step could not be tried on a copy: {answer.reason}")
            return
        before, after = answer[0], dict(zip(multiples, answer[1:]))
        best = min(after, key=lambda multiple: after[multiple] if math.isfinite(after[multiple]) else math.inf)
        losses = {f"{multiple:g}": loss if math.isfinite(loss) else None for multiple, loss in after.items()}
        rate = max((float(group["lr"]) for group in optimizer.param_groups if group.get("lr") is not None), default=math.nan)
        gain = (before - after[1.0]) / abs(before) if before and math.isfinite(after[1.0]) else -math.inf
        note = {"losses": losses, "best": best, "loss": before, "rate": rate if math.isfinite(rate) else None, "ratio": ratio}
        self.record.read("step_gain", gain, note=note, source=source)


def _matrices(optimizer: Any) -> list[Tensor]:
    """The largest few weights with at least two axes that are about to be stepped."""
    found = [
        parameter
        for group in optimizer.param_groups
        for parameter in group["params"]
        if parameter.grad is not None and parameter.dim() >= 2 and parameter.is_floating_point() and parameter.numel() <= _MAX_ELEMENTS
    ]
    return sorted(found, key=Tensor.numel, reverse=True)[:_MATRICES]


def tried(patient: Patient, optimizer: Any, multiples: tuple[float, ...], given: list[float]) -> list[float]:
    """The loss of the step's own (last) batch before the step and after each multiple of it. Only for a copy: it steps the optimizer.

    Raises RuntimeError where the loss cannot be computed again, or is not one that was handed to backward (`given`).
    """
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"] if parameter.grad is not None]
    if sum(parameter.nbytes for parameter in parameters) > _MAX_BYTES:
        raise RuntimeError("the weights are too many to be copied for it")
    before = _loss(patient)
    if not any(abs(before * share - loss) <= _SAME * abs(loss) for loss in given for share in (1.0, 1.0 / max(len(given), 1))):
        raise RuntimeError("the loss of the last forward is not the one that was handed to backward")
    start = [parameter.detach().clone() for parameter in parameters]
    optimizer.step()
    change = [parameter.detach() - old for parameter, old in zip(parameters, start)]
    losses = [before]
    for multiple in multiples:
        with torch.no_grad():
            for parameter, old, moved in zip(parameters, start, change):
                parameter.copy_(old + multiple * moved)
        with contextlib.suppress(RuntimeError):
            losses.append(_loss(patient))
            continue
        losses.append(math.nan)
    return losses


def _loss(patient: Patient) -> float:
    """The loss of the last training forward, computed again with the weights as they are now."""
    call = next((call for call in reversed(patient.calls) if call.grad_enabled and call.finished), None)
    if call is None:
        raise RuntimeError("no forward of a module was seen")
    with conditions_of(call), torch.no_grad():
        output = bare(call.module)(*call.args, **call.kwargs)
        floating = [tensor for _, tensor in tensors_in(output) if tensor.is_floating_point()]
        scalars = [tensor for tensor in floating if tensor.numel() == 1]
        if scalars:
            return float(scalars[0])
        for loss in reversed(patient.losses):
            for logits in (shaped for tensor in floating for shaped in as_logits(tensor, loss.logits)):
                value = again(loss, logits)
                if value is not None:
                    return float(value)
    raise RuntimeError("the loss could not be computed again from the model's output")


def attach(patient: Patient, record: RecordWriter, loop: Any, asking: Asking) -> Callable[[], None]:
    """From now on updates of unusual size are tried out on a copy."""
    exam = StepSize(patient, record, asking)
    for event in ("backward_begin", "step_begin", "step_end"):
        loop.on(event, exam, getattr(exam, event))
    loop.rests(exam)
    return lambda: None
