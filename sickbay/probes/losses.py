"""Captures calls of torch's loss functions: what logits and targets they were given, and the number they gave."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from sickbay.core.passes import highest_pass
from sickbay.core.record import RecordWriter
from sickbay.patient import CLASSIFYING, LossCall, Patient, user_line
from sickbay.probes.loop import Loop
from sickbay.probes.loss_lines import call_beside
from sickbay.probes.nap import Nap
from sickbay.probes.unseen import interpose, unseen

SIGNALS = ("train_loss", "eval_loss", "validation_loss", "chance_loss", "ignored_targets")

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
_FIRST_READINGS = 8
_MAX_EVALUATED = 4096  # batches of one evaluation


class Losses:
    """Keeps the step's loss calls for the other probes and exams, and writes what evaluation and chance look like."""

    SIGNALS = SIGNALS

    def __init__(self, patient: Patient, record: RecordWriter, loop: Loop) -> None:
        self.patient, self.record, self.loop = patient, record, loop
        self._depth = 0
        self._evaluated: list[tuple[str, float, int]] = []
        self._pending: list[tuple[str, float, bool]] = []
        self._trained: list[float] = []
        self._asked = ""
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
            nap = self.loop.napping()
            if nap is not None and self.loop.stays_asleep("loss", self, nap.lost, name, value, args, kwargs):
                return value
            if self.loop.awake() or self.patient.muted:
                with self.loop.sheltered("loss", self):
                    self._capture(name, value, args, kwargs)
            return value

        return loss_function

    def slept(self, nap: Nap) -> None:
        nap.readings.append(("train_loss", sum(nap.values) / len(nap.values), ""))

    def woken(self, nap: Nap) -> None:
        """The loss of a step that was slept through so far."""
        self._trained.extend(nap.values)
        lost = nap.loss()
        if lost is None:
            return
        call = self._call(*lost, source=nap.habit.loss_line)
        if call is None:
            return
        call.nodes = nap.nodes
        if nap.stage == "lost":
            self._keep(call)
        else:
            call.spent = True
            self.patient.losses.append(call)

    def _call(self, name: str, value: Any, args: tuple[Any, ...], kwargs: dict[str, Any], source: str) -> LossCall | None:
        logits = args[0] if args else kwargs.get("input")
        targets = args[1] if len(args) > 1 else kwargs.get("target")
        if not (isinstance(logits, Tensor) and isinstance(targets, Tensor) and isinstance(value, Tensor)):
            return None
        if any(torch._C._functorch.is_functorch_wrapped_tensor(tensor) for tensor in (logits, targets, value)):
            return None
        return LossCall(
            name=name,
            logits=logits,
            targets=targets,
            ignore_index=int(kwargs.get("ignore_index", args[4] if name in CLASSIFYING and len(args) > 4 else -100)),
            reduction=str(kwargs.get("reduction", "mean")),
            value=value,
            source=source,
            # What was computed under no_grad may be scored outside of it; a detached output of a training forward is none of an evaluation.
            grad_enabled=torch.is_grad_enabled() and (value.requires_grad or not self.patient.without_gradient),
            smoothing=float(kwargs.get("label_smoothing", 0.0)),
        )

    def _capture(self, name: str, value: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        call = self._call(name, value, args, kwargs, user_line(3))
        if call is not None:
            self._keep(call)

    def _keep(self, call: LossCall) -> None:
        self.patient.add_loss(call)
        if self.patient.muted:
            return
        if call.grad_enabled:
            self._training_loss(call)
            if call.value.numel() == 1 and call.value.device.type == "cpu" and len(self._pending) < _MAX_EVALUATED:
                self._pending.append((_asked(call), per_target(call), call.evaluating))
        else:
            self.patient.losses.pop()  # an evaluation's tensors must not be kept alive
            if call.value.device.type == "cpu" and (call.value.numel() == 1 or call.reduction == "none") and call.value.numel():
                self._evaluation(_asked(call), per_target(call), call.targets.numel())
        self.loop.emit("loss", call)

    def _training_loss(self, call: LossCall) -> None:
        if not call.by_class:
            return
        if not self._chance_known and call.logits.dim() >= 2:
            self._chance_known = True
            classes = call.logits.shape[1]
            self.record.read("chance_loss", math.log(max(classes, 1)), note={"classes": classes}, source=call.source)
        if self._ignored_readings < _FIRST_READINGS and call.targets.device.type == "cpu":
            self._ignored_readings += 1
            write_ignored(self.record, call)

    def _evaluation(self, asked: str, value: float, count: int) -> None:
        if len(self._evaluated) < _MAX_EVALUATED and self.record.step > 0 and math.isfinite(value):
            self._evaluated.append((asked, value, max(1, count)))

    def _take_pending(self) -> None:
        """What a model in training mode lost is trained on; in evaluation mode before it, an evaluation that does without no_grad."""
        pending, self._pending = self._pending, []
        everything = all(evaluating for *_, evaluating in pending)
        for asked, value, evaluating in pending:
            if evaluating and not everything:
                self._evaluation(asked, value, 1)
                continue
            self._asked = self._asked or asked
            if asked == self._asked and math.isfinite(value):
                self._trained.append(value)

    def backward_begin(self, loss: Tensor | None, kind: str) -> None:
        """What was lost since the last backward is sorted."""
        self._take_pending()
        self._look_at_targets(loss)

    def _look_at_targets(self, loss: Tensor | None) -> None:
        """A batch without any target makes the mean 0/0; the check is paid only once the loss is not finite."""
        if loss is None or loss.numel() != 1 or loss.device.type != "cpu" or math.isfinite(loss.item()):
            return
        for call in self.patient.losses:
            if call.by_class:
                write_ignored(self.record, call)

    def round_end(self, step: int) -> None:
        if self._trained:
            self.record.read("train_loss", sum(self._trained) / len(self._trained))
            self._trained.clear()
        self._write_evaluation()

    def finish(self) -> None:
        """The evaluation after the last step."""
        self._write_evaluation()

    def _write_evaluation(self) -> None:
        """Losses that ask what training asks, if there are any: an evaluation may compute others beside them."""
        evaluated, self._evaluated = self._evaluated, []
        chosen = [row for row in evaluated if row[0] == self._asked] or evaluated
        if not chosen:
            return
        losses, weights = [value for _, value, _ in chosen], [count for *_, count in chosen]
        self.record.read("eval_loss", sum(losses) / len(losses), note={"batches": len(losses)})
        highest = highest_pass(losses, weights)
        self.record.read("validation_loss", highest.mean, note={"error": highest.error, "batches": highest.batches})


def _asked(call: LossCall) -> str:
    """What the loss is of: the function, and the number of classes or of features."""
    reduction = "mean" if _summed(call) or call.reduction == "none" else call.reduction
    return f"{call.name} {reduction} of {call.logits.shape[1] if call.logits.dim() > 1 else 1}"


def _summed(call: LossCall) -> bool:
    """True for a sum over class targets, which a script divides by their number afterwards, or by that of a whole accumulated batch."""
    return call.reduction == "sum" and call.by_class


def per_target(call: LossCall) -> float:
    """The loss of `call`; of a sum or of single losses over class targets, the mean over those that count. One pass over the targets."""
    if call.reduction == "none" and not call.by_class:
        return float(call.value.mean())
    value = call.value.item() if call.value.numel() == 1 else float(call.value.sum())
    if not _summed(call) and call.reduction != "none":
        return value
    counted = int((call.targets != call.ignore_index).sum())
    return value / counted if counted else value


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
    for event in ("slept", "woken", "finish"):
        loop.on(event, probe, getattr(probe, event))
    loop.sleeps(probe)

    def detach() -> None:
        while undo:
            undo.pop()()

    return detach
