"""Asks, once the run has its pace, what a step's time is spent on and what would save it.

It is measured in a forked copy on the step's own batch.

Everything is compared in processor seconds of the same copy with one thread, so that neither other programs nor the number of threads
change a ratio. What has no reason to be asked is not: the first question is short unless the step itself gives cause.
"""

from __future__ import annotations

import statistics
import sys
import time
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from sickbay.core.record import RecordWriter
from sickbay.exams import copies, fork, loops, op_profile, products
from sickbay.exams.asking import Asking
from sickbay.exams.trace import batch_size
from sickbay.patient import ForwardCall, Patient, bare, mapped, tensors_in
from sickbay.probes.loop import Loop

SIGNALS = ("float64_gain", "loop_gain", "broadcast_gain", "attention_gain", "copy_share", "single_forwards", "throughput_gain")

_AT = (6, 20, 40, 60, 100, 200, 600)  # steps: the first is past what starting up costs
_PASSES = {True: 4, False: 7}  # forwards and backwards that the question takes, as long as nothing turns up, where one is long or not
_LONG = 0.05  # seconds: what takes this long is timed well enough by one pass
_SHORT = 0.5  # seconds: a question of this length may be asked once early
_CAUSED = 4.0  # seconds: with a cause to ask (float64, single rows, very many operations)
_SHARE_OF_RUN = 0.1  # what a first question may take of the run so far
_MOST = 8.0  # seconds
_SINGLE = 8  # calls of one row in a step that are worth a question
_MANY_NODES = 1500  # autograd nodes in a step: more than most models of some dozen layers make in one forward
_SIZES = (2, 4, 8, 16)  # times the script's own batch


class Speed:
    """Follows what a step's calls look like and how long they take; asks at few steps."""

    SIGNALS = SIGNALS

    def __init__(self, patient: Patient, record: RecordWriter, loop: Loop, asking: Asking) -> None:
        self.patient, self.record, self.loop, self.asking = patient, record, loop, asking
        self._asked = 0
        self._settled = False
        self._began = time.monotonic()
        self._stamp = 0.0
        self._last_calls = 1
        self._steps: list[float] = []  # processor seconds of forwards and backwards, for each step
        self._compute = 0.0
        self._nodes, self._first_node = 0, -1
        self._by_backward = False
        self._singles = Singles()
        self._single_steps: list[Rows] = []

    # --- the loop's events ---------------------------------------------------------------------------------------------
    def forward_begin(self, call: ForwardCall) -> None:
        self._stamp = time.thread_time()
        if call.grad_enabled and not self._settled:
            self._singles.add(call)

    def forward_end(self, call: ForwardCall, output: Any) -> None:
        if call.grad_enabled:
            self._compute += time.thread_time() - self._stamp
            self._singles.made(call, output)

    def backward_begin(self, loss: Tensor | None, kind: str) -> None:
        if loss is not None and loss.grad_fn is not None:
            number = loss.grad_fn._sequence_nr()
            self._nodes, self._first_node = (number - self._first_node if self._first_node >= 0 else 0), number
        self._by_backward = self._by_backward or kind == "backward"
        # torch.autograd.grad stands for the step's backward where there is no other; elsewhere it is a part of a loss.
        whole = kind == "backward" or (kind == "grad" and not self._by_backward)
        if not self._settled and whole and self._asked < len(_AT) and self.record.step >= _AT[self._asked]:
            self._consider()
        self._stamp = time.thread_time()

    def backward_end(self, loss: Tensor | None, kind: str) -> None:
        self._compute += time.thread_time() - self._stamp

    def round_end(self, step: int) -> None:
        if len(self._steps) < 64:
            self._steps.append(self._compute)
        self._compute, self._last_calls = 0.0, max(1, self._singles.calls)
        if len(self._single_steps) < 64:
            self._single_steps.append(self._singles.most())
        self._singles = Singles()

    # --- the question -----------------------------------------------------------------------------------------------------
    def _consider(self) -> None:
        calls = [call for call in self.patient.training_calls() if not call.spent]
        if not calls or len(self._steps) < 3 or _ranks() > 1:
            self._asked += 1
            return
        single = statistics.median(rows.count for rows in self._single_steps)
        alone = self._single_steps[-1].module if single >= _SINGLE else 0
        call = next((call for call in reversed(calls) if id(call.module) == alone), calls[-1])
        wide = any(p.dtype == torch.float64 for p in bare(call.module).parameters())
        caused = wide or single >= _SINGLE or self._nodes > _MANY_NODES * max(1, len(calls))
        one = statistics.median(self._steps[1:]) / self._last_calls
        expected = _PASSES[one >= _LONG] * one
        elapsed = time.monotonic() - self._began
        if not (self.asking.affordable() or expected < _SHORT or expected < _SHARE_OF_RUN * elapsed or (caused and expected < _CAUSED)):
            self._asked += 1
            return
        self._asked = len(_AT)
        self._settled = True
        most = min(_MOST, max(_CAUSED if caused else _SHORT, expected))  # thousands of small operations take longer to time than to run
        singles = int(single) if single >= _SINGLE else 0
        answer = self.asking.ask(lambda: fork.ask(lambda: question(call, wide, singles, most), _MOST + 20))
        if isinstance(answer, fork.NoAnswer):
            for signal in SIGNALS:
                self.record.unobserved(signal, answer.reason)
            return
        self._write(answer, self.patient.compute_share())

    def _write(self, answer: dict[str, Any], share: float) -> None:
        for signal, reason in answer["reasons"].items():
            self.record.unobserved(signal, reason)
        for reading in answer["readings"]:
            value = reading["value"] * (1.0 if reading["signal"] in ("throughput_gain", "single_forwards") else share)
            note = {**reading["note"], "compute_share": round(share, 4)}
            source = reading.get("source", "")
            if reading["signal"] == "single_forwards":
                last = self._single_steps[-1]
                note.update(same_storage=last.same_storage, shape=last.shape, saved=share * (1 - 1 / max(1.0, note["gain"])))
                source = last.source
            self.record.read(reading["signal"], value, where=reading.get("where", ""), note=note, source=source)


class Singles:
    """The calls of one step that pass a single row each, module by module."""

    def __init__(self) -> None:
        self.calls = 0
        self._rows: dict[int, Rows] = {}

    def add(self, call: ForwardCall) -> None:
        self.calls += 1
        self._rows.setdefault(id(call.module), Rows(id(call.module))).add(call)

    def made(self, call: ForwardCall, output: Any) -> None:
        if id(call.module) in self._rows:
            self._rows[id(call.module)].made(output)

    def most(self) -> Rows:
        """Those of the module that is called most often so."""
        return max(self._rows.values(), key=lambda rows: rows.count, default=Rows(0))


class Rows:
    """One module's calls with single rows of equal shape, none of them needing another's result.

    `count`: 0 where the calls are no such. `shape`: of one. `source`: the user's line. `module`: its id.
    """

    def __init__(self, module: int) -> None:
        self.module = module
        self.shape: list[int] = []
        self.source = ""
        self._made = 0
        self._storages: set[int] = set()
        self._outputs: set[int] = set()
        self._sequential = False

    @property
    def count(self) -> int:
        return 0 if self._sequential else self._made

    @property
    def same_storage(self) -> bool:
        """Whether the rows lie in one tensor."""
        return self.count > 1 and len(self._storages) == 1

    def add(self, call: ForwardCall) -> None:
        tensors = [tensor for _, tensor in tensors_in((call.args, call.kwargs))]
        if not tensors or any(tensor.requires_grad for tensor in tensors):
            self._sequential = True
            return
        shape = list(tensors[0].shape)
        if shape[:1] != [1] or len(shape) < 2 or (self.shape and shape != self.shape):
            self._sequential = self._sequential or bool(self.shape)
            return
        storages = {int(tensor.untyped_storage()._cdata) for tensor in tensors}
        self._sequential = self._sequential or bool(storages & self._outputs)
        self._storages.add(int(tensors[0].untyped_storage()._cdata))
        self.shape, self.source = shape, call.source
        self._made += 1

    def made(self, output: Any) -> None:
        """What one of the calls gave."""
        if self._made:
            self._outputs |= {int(tensor.untyped_storage()._cdata) for _, tensor in tensors_in(output)}


def _ranks() -> int:
    distributed = sys.modules.get("torch.distributed")
    return int(distributed.get_world_size()) if distributed is not None and distributed.is_initialized() else 1


# --- inside the copy ------------------------------------------------------------------------------------------------------------
def question(call: ForwardCall, wide: bool, singles: int, most: float) -> dict[str, Any]:
    """Readings as shares of the forward's and backward's seconds, and reasons for the signals that have none."""
    began = time.process_time()
    readings: list[dict[str, Any]] = []
    reasons: dict[str, str] = {}

    def ask(signals: tuple[str, ...], part: Callable[[], list[dict[str, Any]]], empty: dict[str, Any] | None = None) -> None:
        if time.process_time() - began > most:
            reasons.update(dict.fromkeys(signals, "looking longer would have taken too large a part of the run"))
            return
        try:
            found = part()
        except Exception as problem:
            reasons.update(dict.fromkeys(signals, f"the forward could not be run again: {type(problem).__name__}: {problem}"[:200]))
            return
        known = {reading["signal"] for reading in found}
        readings.extend(found + [{"signal": signal, "value": 0.0, "note": {}} for signal in signals if signal not in known])

    first = op_profile.pass_seconds(call, call.args, call.kwargs, most, times=1)  # pages of the copy are copied at first touch
    seconds = op_profile.pass_seconds(call, call.args, call.kwargs, most / 8, times=1 if first >= _LONG else 3)
    if singles:
        ask(("single_forwards",), lambda: [_together(call, singles, seconds, most / 4)])
    if wide:
        ask(("float64_gain",), lambda: [_narrow(call, seconds, most / 4)])
    profile = op_profile.Profile()

    def profiled() -> list[dict[str, Any]]:
        nonlocal profile
        profile = op_profile.profile(call)
        return []

    ask((), profiled)
    if not profile.complete or not profile.operations:
        reasons.update(dict.fromkeys(SIGNALS[1:5], "the forward has too many operations to follow them all"))
    else:
        # The copies come first: where there are none, they are answered from the profile at no cost.
        ask(("copy_share",), lambda: copies.examine(call, profile))
        ask(("loop_gain",), lambda: loops.examine(profile, batch_size(call), op_profile.forward_seconds(call), most / 2))
        ask(("broadcast_gain", "attention_gain"), lambda: products.examine(profile, most / 8))
    profile = op_profile.Profile()
    ask(("throughput_gain",), lambda: _curve(call, seconds, most / 4))
    return {"readings": readings, "reasons": reasons}


def repeated(value: Any, times: int, rows: int) -> Any:
    """`value` with every tensor whose leading dimension is `rows` repeated along it."""
    return mapped(value, lambda t: torch.cat([t.detach()] * times) if t.dim() > 0 and t.shape[0] == rows else t)


def _together(call: ForwardCall, count: int, seconds: float, most: float) -> dict[str, Any]:
    together = op_profile.pass_seconds(call, repeated(call.args, count, 1), repeated(call.kwargs, count, 1), most)
    note = {"gain": count * seconds / together, "one_by_one": count * seconds, "together": together}
    return {"signal": "single_forwards", "value": count, "note": note}


def _narrow(call: ForwardCall, seconds: float, most: float) -> dict[str, Any]:
    """What is left in float32 of a forward and backward; the copy's own weights are changed for it, and changed back."""

    def narrowed(value: Any) -> Any:
        return mapped(value, lambda tensor: tensor.float() if tensor.dtype == torch.float64 else tensor)

    module = bare(call.module)
    before = torch.get_default_dtype()
    elements = sum(p.numel() for p in module.parameters() if p.dtype == torch.float64)
    module.float()
    torch.set_default_dtype(torch.float32)
    try:
        args, kwargs = narrowed(call.args), narrowed(call.kwargs)
        op_profile.pass_seconds(call, args, kwargs, most, times=1)
        fast = op_profile.pass_seconds(call, args, kwargs, most)
    finally:
        torch.set_default_dtype(before)
        module.double()
    note = {"seconds64": seconds, "seconds32": fast, "elements": elements, "threads": torch.get_num_threads()}
    return {"signal": "float64_gain", "value": max(0.0, 1 - fast / seconds), "note": note}


def _curve(call: ForwardCall, seconds: float, most: float) -> list[dict[str, Any]]:
    """Rows a second at the script's own batch and at multiples of it, as long as there is time."""
    rows = batch_size(call)
    if not rows:
        raise ValueError("no input has rows")
    curve, spent = {rows: rows / seconds}, time.process_time()
    for times in _SIZES:
        if time.process_time() - spent + times * seconds > most:
            break
        took = op_profile.pass_seconds(call, repeated(call.args, times, rows), repeated(call.kwargs, times, rows), times * seconds, times=2)
        curve[rows * times] = rows * times / took
    if len(curve) < 2:
        return []
    best = max(curve.values())
    knee = min(size for size, speed in curve.items() if speed >= 0.8 * best)
    note = {"rows": rows, "knee": knee, "curve": {str(size): round(speed, 1) for size, speed in curve.items()}}
    return [{"signal": "throughput_gain", "value": best / curve[rows], "note": note}]


def attach(patient: Patient, record: RecordWriter, loop: Loop, asking: Asking) -> Callable[[], None]:
    """From now on the question is asked when it is due."""
    exam = Speed(patient, record, loop, asking)
    for event in ("forward_begin", "forward_end", "backward_begin", "backward_end", "round_end"):
        loop.on(event, exam, getattr(exam, event))
    loop.rests(exam)
    return lambda: None
