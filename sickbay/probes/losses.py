"""Captures calls of torch's loss functions: what logits and targets they were given, and the number they gave."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from sickbay.core.record import RecordWriter
from sickbay.patient import LossCall, Patient, user_line
from sickbay.probes.loop import Loop
from sickbay.probes.loss_lines import call_beside
from sickbay.probes.unseen import interpose, unseen

SIGNALS = ("eval_loss", "chance_loss", "ignored_targets")

_FUNCTIONS = (
    "cross_entropy",
    "nll_loss",
    "mse_loss",
    "l1_loss",
    "smooth_l1_loss",
    "huber_loss",
    "binary_cross_entropy",
    "binary_cross_entropy_with_logits",
    "kl_div",
)
_CLASSIFYING = ("cross_entropy", "nll_loss")
_FIRST_READINGS = 8


class Losses:
    """Keeps the step's loss calls for the other probes and exams, and writes what evaluation and chance look like."""

    SIGNALS = SIGNALS

    def __init__(self, patient: Patient, record: RecordWriter, loop: Loop) -> None:
        self.patient, self.record, self.loop = patient, record, loop
        self._depth = 0
        self._evaluated: list[float] = []
        self._ignored_readings = 0
        self._chance_known = False

    def around(self, name: str, original: Any) -> Any:
        @unseen
        def loss_function(*args: Any, **kwargs: Any) -> Any:
            if torch.compiler.is_compiling() or self._depth:
                return original(*args, **kwargs)
            self._depth += 1
            try:
                value = call_beside(original, args, kwargs)
            finally:
                self._depth -= 1
            if self.loop.awake() or self.patient.muted:
                with self.loop.sheltered("loss", self):
                    self._capture(name, value, args, kwargs)
            return value

        return loss_function

    def _capture(self, name: str, value: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        logits = args[0] if args else kwargs.get("input")
        targets = args[1] if len(args) > 1 else kwargs.get("target")
        if not (isinstance(logits, Tensor) and isinstance(targets, Tensor) and isinstance(value, Tensor)):
            return
        if any(torch._C._functorch.is_functorch_wrapped_tensor(tensor) for tensor in (logits, targets, value)):
            return
        call = LossCall(
            name=name,
            logits=logits,
            targets=targets,
            ignore_index=int(kwargs.get("ignore_index", args[4] if name in _CLASSIFYING and len(args) > 4 else -100)),
            reduction=str(kwargs.get("reduction", "mean")),
            value=value,
            source=user_line(3),
            grad_enabled=torch.is_grad_enabled(),
            smoothing=float(kwargs.get("label_smoothing", 0.0)),
        )
        self.patient.add_loss(call)
        if self.patient.muted:
            return
        if call.grad_enabled:
            self._training_loss(call)
        elif value.numel() == 1:
            self.patient.losses.pop()  # an evaluation's tensors must not be kept alive
            if len(self._evaluated) < 4096 and self.record.step > 0 and value.device.type == "cpu":
                self._evaluated.append(value.item())
        self.loop.emit("loss", call)

    def _training_loss(self, call: LossCall) -> None:
        if call.name not in _CLASSIFYING or call.targets.is_floating_point():
            return
        if not self._chance_known and call.logits.dim() >= 2:
            self._chance_known = True
            classes = call.logits.shape[1]
            self.record.read("chance_loss", math.log(max(classes, 1)), note={"classes": classes}, source=call.source)
        if self._ignored_readings < _FIRST_READINGS and call.targets.device.type == "cpu":
            self._ignored_readings += 1
            write_ignored(self.record, call)

    def backward_begin(self, loss: Tensor | None, kind: str) -> None:
        """A batch without any target makes the mean 0/0; the check is paid only once the loss is not finite."""
        if loss is None or loss.numel() != 1 or loss.device.type != "cpu" or math.isfinite(loss.item()):
            return
        for call in self.patient.losses:
            if call.name in _CLASSIFYING and not call.targets.is_floating_point():
                write_ignored(self.record, call)

    def round_end(self, step: int) -> None:
        if self._evaluated:
            finite = [value for value in self._evaluated if math.isfinite(value)]
            if finite:
                self.record.read("eval_loss", sum(finite) / len(finite), note={"batches": len(self._evaluated)})
            self._evaluated.clear()


def write_ignored(record: RecordWriter, call: LossCall) -> None:
    """The share of this call's targets that the loss skips."""
    count = call.targets.numel()
    ignored = int((call.targets == call.ignore_index).sum()) if count else 0
    note = {"count": count, "ignore_index": call.ignore_index}
    record.read("ignored_targets", ignored / count if count else 1.0, note=note, source=call.source)


def attach(patient: Patient, record: RecordWriter, loop: Loop) -> Callable[[], None]:
    """From now on every call of a torch loss function is captured; the returned function undoes it."""
    probe = Losses(patient, record, loop)
    undo = [interpose(getattr(F, name), functools.partial(probe.around, name)) for name in _FUNCTIONS]
    loop.on("backward_begin", probe, probe.backward_begin)
    loop.on("round_end", probe, probe.round_end)

    def detach() -> None:
        while undo:
            undo.pop()()

    return detach
