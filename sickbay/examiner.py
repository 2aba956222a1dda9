"""Decides when the active questions are asked, so that they cost little and come as soon as there is something to ask."""

from __future__ import annotations

import contextlib
import importlib
import math
import traceback
import weakref
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor, nn

from sickbay.core.record import RecordWriter
from sickbay.core.signals import wanted
from sickbay.exams import internals, masks, missing_gradient, nonfinite
from sickbay.exams.asking import Asking
from sickbay.exams.fork import NoAnswer, can_fork
from sickbay.exams.nonfinite import Finding
from sickbay.exams.padding import declared_ids, may_hold_padding
from sickbay.exams.stretch import Stretch
from sickbay.exams.ungraded import Ungraded
from sickbay.patient import Patient, bare, is_user_file, tensors_in
from sickbay.probes import loss_lines
from sickbay.probes.gradients import clean, parameter_names
from sickbay.probes.graph import is_scaled
from sickbay.probes.loop import Loop

SIGNALS = (*masks.SIGNALS, *internals.SIGNALS, "first_nonfinite")

# Modules of exams/ that know themselves when their question is due: `attach(patient, record, loop, asking)`.
EXAMS: tuple[str, ...] = (
    "holders",
    "structure",
    "schedule_function",
    "step_size",
    "speed",
    "generation_path",
    "broadcasts",
    "custom_backward",
    "settings",
    "memory_parts",
    "overflow",
    "preparation",
)

_MASKS_AT = (0, 1, 2, 5, 20, 100)
_INTERNALS_AT = (0, 5, 15, 40, 100, 200, 400, 800, 1600, 3200, 6400)
_CHEAP = 0.15  # seconds of processor time: a question this cheap may be asked a few times early, so that short runs are looked at as well
_CHEAP_QUESTIONS = 4
_ONCE = 0.5  # seconds of processor time: a question this cheap is put once more when padding is first seen
_PADDING_WITHIN = 200  # forwards in which a model that has seen no padding yet is watched for it
_NO_HISTORY = "does not require grad and does not have a grad_fn"
_STRETCH = ("forward_begin", "forward_end", "backward_asked", "backward_end")  # where what is between model and backward begins and ends
_TRACES = 2  # non-finite values traced before the rest is left alone


@dataclass
class Asked:
    """What one model has been asked so far: how many forwards it made, how often each question was put, which signals have an answer.

    `masks_cost`, `internals_cost`: seconds of the dearest so far. `pads`: ids that the model calls padding, None until it was asked.
    """

    forwards: int = 0
    masks: int = 0
    internals: int = 0
    masks_cost: float = 0.0
    internals_cost: float = 0.0
    pads: frozenset[int] | None = None
    settled: set[str] = field(default_factory=set)


class Examiner:
    """Asks about masks, labels and internals at a few steps, and for the origin of the first non-finite value."""

    SIGNALS = SIGNALS

    def __init__(
        self, patient: Patient, record: RecordWriter, loop: Loop, folder: str | None, asking: Asking, asked: frozenset[str] | None
    ) -> None:
        self.patient, self.record, self.loop, self.folder = patient, record, loop, folder
        self._asked: weakref.WeakKeyDictionary[nn.Module, Asked] = weakref.WeakKeyDictionary()
        self._functional = Asked()
        self._lines = loss_lines.LossLines(told=self._operation)
        self._stretch = Stretch(self._lines.segments)
        self._ungraded = Ungraded()
        self.asking = asking
        self._masks = asked is None or bool(asked.intersection(masks.SIGNALS))
        self._internals = asked is None or bool(asked.intersection(internals.SIGNALS))
        self._traces = 0
        self._traced_step = -1
        self._stepped_nonfinite = False

    def _operation(self, function: Any, args: Any, result: Any, start: int) -> None:
        """An operation between the model's output and backward: who pairs operands is told, if it made something larger than they are."""
        self._ungraded.note(function, args, result)
        if len(args) != 2 or not all(isinstance(tensor, Tensor) for tensor in (*args, result)):
            return
        if result.shape != args[0].shape and result.shape != args[1].shape:
            self.loop.emit("outgrown", function, args, result, start)

    # --- the loop's events ----------------------------------------------------------------------------------------
    def forward_begin(self, call: Any) -> None:
        self._lines.end()

    def forward_end(self, call: Any, output: Any) -> None:
        # A teacher's forward may stand between the model's own and the loss.
        if call.grad_enabled or any(not one.spent for one in self.patient.training_calls()):
            self._lines.begin()

    def backward_asked(self) -> None:
        self._lines.end()

    def backward_begin(self, loss: Tensor | None, kind: str) -> None:
        self._lines.end()
        if kind == "func" or loss is None or loss.numel() != 1:
            return
        if loss.device.type == "cpu" and not math.isfinite(loss.item()):
            if not self._only_scaled_too_far():
                self._trace("loss", loss)
            return
        calls = self.patient.training_calls()
        captured = [call for call in self.patient.losses if call.grad_enabled and not call.spent]
        self._stretch.note(loss, bool(calls) and len(captured) == 1 and is_scaled(loss, captured[0].nodes[1]))
        self._examine(self._asked.setdefault(calls[-1].module, Asked()) if calls else self._functional, loss)

    def slept(self, nap: Any) -> None:
        """Questions become due by the number of forwards, seen or not."""
        asked = self._asked.get(nap.habit.module())
        if asked is not None:
            asked.forwards += nap.habit.backwards

    def backward_end(self, loss: Tensor | None, kind: str) -> None:
        if not self.patient.roots and kind != "func":
            self._lines.begin()

    def compiling(self) -> None:
        self._lines.end()

    def functional(self, function: Callable[..., Any], args: Any, kwargs: Any) -> None:
        self.patient.functional = lambda: function(*args, **kwargs)
        self._examine(self._functional, None)

    def nonfinite(self, what: Literal["loss", "gradient"], loss: Tensor | None) -> None:
        self._trace(what, loss)

    def round_end(self, step: int) -> None:
        self._stretch.forget()
        self._ungraded.forget()
        learning = self._lines.learning
        self._lines.end_step()
        if learning and not self._lines.learning:
            for event in _STRETCH:
                self.loop.off(event, self)
        self.patient.functional = None

    # --- questions --------------------------------------------------------------------------------------------------
    def _examine(self, asked: Asked, loss: Tensor | None) -> None:
        forwards, asked.forwards = asked.forwards, asked.forwards + 1
        if (
            self._masks
            and asked.masks < len(_MASKS_AT)
            and forwards >= _MASKS_AT[asked.masks]
            and self._due(asked, forwards, asked.masks_cost)
        ):
            asked.masks += 1
            self._write(asked, masks.SIGNALS, lambda: masks.examine(self.patient, loss, self.record.step))
            asked.masks_cost = max(asked.masks_cost, self.asking.cost)
            if {"target_offset", "row_influence"} <= asked.settled:
                asked.masks = max(asked.masks, _MASKS_AT.index(20))
        elif self._masks and asked.masks and forwards < _PADDING_WITHIN and self._padding_came(asked):
            self._write(asked, masks.SIGNALS, lambda: masks.examine(self.patient, loss, self.record.step))
        due = self._internals and asked.internals < len(_INTERNALS_AT) and forwards >= _INTERNALS_AT[asked.internals]
        if due and self._due(asked, forwards, asked.internals_cost):
            asked.internals += 1
            self._write(asked, internals.SIGNALS, lambda: internals.examine(self.patient, self.record.step))
            asked.internals_cost = max(asked.internals_cost, self.asking.cost)

    def _padding_came(self, asked: Asked) -> bool:
        """True once: in the first batch with padding, where those that were looked at had none, as in batches of equal length."""
        calls = self.patient.training_calls()
        if not calls or asked.pads == frozenset() or "padding_influence" in asked.settled:
            return False
        call = calls[-1]
        if asked.pads is None:
            asked.pads = declared_ids(bare(call.module))
        if not may_hold_padding([tensor for _, tensor in tensors_in((call.args, call.kwargs))], asked.pads):
            return False
        if asked.masks_cost > _ONCE and not self.asking.affordable():
            return False
        asked.pads = frozenset()
        return True

    def _due(self, asked: Asked, forwards: int, cost: float) -> bool:
        """The first questions are asked in any case, cheap ones a few times more; then the purse decides."""
        return forwards < 3 or (cost < _CHEAP and asked.internals < _CHEAP_QUESTIONS) or self.asking.affordable()

    def _write(self, asked: Asked, signals: tuple[str, ...], question: Callable[[], Any]) -> None:
        answer = self.asking.ask(question)
        if isinstance(answer, NoAnswer):
            for signal in signals:
                if signal not in asked.settled:
                    self.record.unobserved(signal, answer.reason)
            return
        for signal, reason in getattr(answer, "reasons", {}).items():
            if signal not in asked.settled:
                self.record.unobserved(signal, reason)
        for reading in answer:
            asked.settled.add(reading["signal"])
            self.record.read(
                reading["signal"],
                reading["value"],
                where=reading.get("where", ""),
                note=reading.get("note"),
                source=reading.get("source", ""),
            )

    def _trace(self, what: Literal["loss", "gradient"], loss: Tensor | None) -> None:
        if not self._stepped_nonfinite:
            self._stepped_nonfinite = True
            self.record.read("nonfinite_step", 1, note={"what": what})
        if self._traces >= _TRACES or self._traced_step == self.record.step:
            return
        self._traced_step = self.record.step
        self._traces += 1
        if what == "loss":
            self._learn_lines_again()
        answer = self.asking.ask(lambda: nonfinite.locate(self.patient, what, loss, self._stretch, self.folder, ungraded=self._ungraded))
        if isinstance(answer, NoAnswer):
            self.record.unobserved("first_nonfinite", answer.reason)
        else:
            update = (
                self._update_that_broke()
                if answer.note.get("phase") == "weight" and self._traces == 1 and math.isfinite(self.patient.norm_at_step)
                else None
            )
            if update is not None:
                step = self.record.step - 1
                self.record.read("first_nonfinite", update.value, where=update.where, note=update.note, source=update.source, step=step)
            self.record.read("first_nonfinite", answer.value, where=answer.where, note=answer.note, source=answer.source)
            if _from_outside(answer.note):
                self.loop.emit("from_outside")

    def _learn_lines_again(self) -> None:
        """Should the next loss be NaN too, its lines and what has no gradient are known."""
        self._lines.again()
        for event in _STRETCH:
            self.loop.on(event, self, getattr(self, event))

    def _update_that_broke(self) -> Finding | None:
        """The optimizer's state that made a weight non-finite although its gradient was finite; None if it was not the update."""
        names = parameter_names(self.patient)
        found = (nonfinite.locate_update(optimizer, names) for optimizer in self.patient.optimizers)
        return next((finding for finding in found if isinstance(finding, Finding)), None)

    def _only_scaled_too_far(self) -> bool:
        """True while a GradScaler is still looking for its scale: the loss itself is finite, and the step will be skipped by design."""
        values = [call.value for call in self.patient.losses if call.grad_enabled and not call.spent and call.value.numel() == 1]
        return self.patient.scale != 1.0 and bool(values) and all(math.isfinite(value.item()) for value in values)

    def gradient_absent(self, names: list[str], backwards: int) -> None:
        """Trainable parameters never got a gradient: does the output depend on them?"""
        answer = self.asking.ask(lambda: missing_gradient.examine(self.patient, names))
        found = answer if isinstance(answer, dict) else {"changes_output": None, "op": "", "reason": getattr(answer, "reason", "")}
        note = {"names": names[:32], "backwards": backwards, **found}
        self.record.read("gradient_absent", len(names), where=names[0], note=note, source=str(found.get("source") or ""))

    def failed(self, exception: Exception) -> None:
        """A backward from a loss without history: every trainable parameter of the last forward is without gradient."""
        if _NO_HISTORY not in str(exception):
            return
        root = self.patient.root
        names = [clean(name) for name, p in root.named_parameters() if p.requires_grad] if root is not None else []
        if not names:
            return
        answer = self.asking.ask(lambda: missing_gradient.examine(self.patient, names))
        found = answer if isinstance(answer, dict) else {}
        line = str(found.get("source") or "") or _line_of(exception)
        note = {"names": names[:32], "backwards": 1, "changes_output": True, "op": found.get("op") or "", "raised": True}
        self.record.read("gradient_absent", len(names), where=names[0], note=note, source=line)

    def detach(self) -> None:
        self._lines.end()


def _from_outside(note: dict[str, Any]) -> bool:
    """True where the operation that was found only met what was not finite before it."""
    met = note.get("ungraded") or any(operand.get("nonfinite") for operand in note.get("operands") or ())
    return note.get("phase") == "input" or (note.get("phase") in ("forward", "loss") and bool(met))


def _line_of(exception: BaseException) -> str:
    """`file:line` of the user's innermost frame in the traceback; "" if there is none."""
    frames = [(frame.f_code.co_filename, line) for frame, line in traceback.walk_tb(exception.__traceback__)]
    return next((f"{name}:{line}" for name, line in reversed(frames) if is_user_file(name)), "")


def attach(
    patient: Patient, record: RecordWriter, loop: Loop, folder: str | None, asked: frozenset[str] | None = None
) -> Callable[[], None]:
    """From now on questions are asked when they are due; only those that measure one of the signals `asked` for, if that is not None."""
    reason = can_fork()
    if reason and not torch.cuda.is_initialized():
        for signal in SIGNALS:
            record.unobserved(signal, reason)
        return lambda: None
    asking = Asking(patient, loop.note_problem)
    examiner = Examiner(patient, record, loop, folder, asking, asked)
    for event in (*_STRETCH, "compiling", "backward_begin", "functional", "nonfinite", "gradient_absent", "failed", "round_end", "slept"):
        loop.on(event, examiner, getattr(examiner, event))
    loop.sleeps(examiner, through=("backward_begin", "round_end"))
    detach = [examiner.detach]
    for name in EXAMS:
        try:
            module = importlib.import_module(f"sickbay.exams.{name}")
            if wanted(module, asked):
                detach.append(module.attach(patient, record, loop, asking))
        except Exception as problem:
            loop.note_problem(name, "attach", problem)

    def detach_all() -> None:
        for one in detach:
            with contextlib.suppress(Exception):
                one()

    return detach_all
