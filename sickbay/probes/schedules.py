"""Follows torch's learning-rate schedulers: how many steps each took against its optimizer's, and what length it was built for."""

from __future__ import annotations

import contextlib
import weakref
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from torch.optim import lr_scheduler

from sickbay.core.rates import Plan
from sickbay.core.record import RecordWriter
from sickbay.patient import Patient, bare_optimizer, user_line
from sickbay.probes.loop import Loop
from sickbay.probes.nap import Nap
from sickbay.probes.schedule_plan import parts_of, plan_of
from sickbay.probes.step_calls import step_calls
from sickbay.probes.unseen import unseen

SIGNALS = ("scheduler_steps",)

_BUILT_BY_THEMSELVES = ("SequentialLR", "ChainedScheduler", "ReduceLROnPlateau")  # their __init__ does not call the base class's
_LINES = 3  # calls of step whose source line is looked up


@dataclass
class Held:
    """What is remembered of one scheduler, also when it is gone.

    `updates`: its optimizer's steps; `moves`: of these, how many found it advanced. `first`, `last`: in its own steps.
    """

    ref: weakref.ref[Any]
    name: str
    source: str
    plan: Plan | None = None
    first: int = 0
    last: int = 0
    updates: int = 0
    moves: int = 0
    called: str = ""
    lines: int = 0
    rate: float | None = None


class Schedules:
    """Counts scheduler steps by reading `last_epoch` after each optimizer step (1 us per scheduler), and writes the sums at the end."""

    SIGNALS = SIGNALS

    def __init__(self, patient: Patient, record: RecordWriter, loop: Loop) -> None:
        self.patient, self.record, self.loop = patient, record, loop
        self._by_optimizer: weakref.WeakKeyDictionary[Any, list[Held]] = weakref.WeakKeyDictionary()
        self._known: weakref.WeakKeyDictionary[Any, Held] = weakref.WeakKeyDictionary()
        self._everyone: list[tuple[Held, str]] = []
        self._made_at: weakref.WeakKeyDictionary[Any, str] = weakref.WeakKeyDictionary()
        self._updated_at: set[str] = set()

    # --- what the loop and torch tell -----------------------------------------------------------------------------
    def optimizer_created(self, optimizer: Any) -> None:
        self._made_at[optimizer] = user_line(4)

    def around_init(self, original: Any) -> Any:
        @unseen
        def __init__(scheduler: Any, *args: Any, **kwargs: Any) -> None:
            original(scheduler, *args, **kwargs)
            if self.loop.awake():
                with self.loop.sheltered("scheduler_created", self):
                    self._admit(scheduler, user_line(2))

        return __init__

    def around_step(self, original: Any) -> Any:
        @unseen
        def step(scheduler: Any, *args: Any, **kwargs: Any) -> None:
            with self.loop.sheltered("scheduler_step", self):
                held = self._known.get(scheduler)
                if held is not None and held.lines < _LINES:
                    held.lines, held.called = held.lines + 1, user_line(2)
            original(scheduler, *args, **kwargs)

        return step

    def _admit(self, scheduler: Any, source: str) -> None:
        """`scheduler` is followed; the parts of one that joins others are not followed by themselves."""
        for part in parts_of(scheduler):
            held = self._known.pop(part, None)
            self._everyone = [(known, made) for known, made in self._everyone if known is not held]
            for schedulers in self._by_optimizer.values():
                schedulers[:] = [known for known in schedulers if known is not held]
        optimizer = getattr(scheduler, "optimizer", None) or next((part.optimizer for part in parts_of(scheduler)), None)
        if optimizer is None or scheduler in self._known:
            return
        optimizer = bare_optimizer(optimizer)
        self.loop.wake()
        self.loop.on("step_end", self, self.step_end)
        self.loop.on("slept", self, self.slept)
        self.loop.sleeps(self, through=("step_end",))
        held = self._known[scheduler] = Held(weakref.ref(scheduler), type(scheduler).__name__, source)
        self._by_optimizer.setdefault(optimizer, []).append(held)
        self._everyone.append((held, self._made_at.get(optimizer, "")))

    def step_end(self, optimizer: Any) -> None:
        schedulers = self._by_optimizer.get(optimizer)
        if not schedulers:
            return
        for held in schedulers:
            scheduler = held.ref()
            if scheduler is None:
                continue
            now = _steps_of(scheduler)
            if held.plan is None:
                held.plan = plan_of(scheduler, self._ask)
                held.first = held.last = now
                with contextlib.suppress(Exception):
                    held.rate = max(float(rate) for rate in scheduler.base_lrs)
                self._updated_at.add(user_line(4))
            held.updates += 1
            if now != held.last:
                held.moves += 1
                held.last = now

    def slept(self, nap: Nap) -> None:
        """A step is counted, whether its events were told or not."""
        self.step_end(nap.habit.optimizer())

    def _ask(self, function: Callable[[int], Any]) -> Plan:
        """The plan behind a user's function, if whoever listens can tell."""
        answers: list[Plan] = []
        self.loop.emit("schedule_function", function, answers.append)
        return answers[0] if answers else Plan("unknown")

    # --- the end ----------------------------------------------------------------------------------------------------
    def finish(self) -> None:
        """The run is over: each scheduler's steps beside its plan and its optimizer's steps."""
        calls = step_calls(self._updated_at) if any(held.updates and not held.moves for held, _ in self._everyone) else None
        for held, made in self._everyone:
            if held.plan is None or not held.updates:
                continue
            scheduler = held.ref()
            if scheduler is not None and (now := _steps_of(scheduler)) != held.last:
                held.moves, held.last = held.moves + 1, now
            note = {
                "updates": held.updates,
                "moves": held.moves,
                "planned": held.plan.length,
                "warmup": held.plan.warmup,
                "kind": held.plan.kind,
                "optimizer": made,
                "called": held.called,
                "base": held.rate,
                "own_loop": calls is not None and calls.own_loop,
                "unreached": calls.others[0] if calls is not None and calls.others else "",
                "stopped": 0 < self.loop.max_steps <= self.record.step,
            }
            self.record.read("scheduler_steps", held.last - held.first, where=held.name, note=note, source=held.source)


def _steps_of(scheduler: Any) -> int:
    """How far `scheduler` is, in its own steps."""
    now = getattr(scheduler, "last_epoch", None)
    if now is None:
        now = next((getattr(part, "last_epoch", 0) for part in parts_of(scheduler)), 0)
    return int(now)


def attach(patient: Patient, record: RecordWriter, loop: Loop) -> Callable[[], None]:
    """From now on every torch scheduler that is built is followed."""
    probe = Schedules(patient, record, loop)
    loop.replace(lr_scheduler.LRScheduler, "__init__", probe.around_init)
    loop.replace(lr_scheduler.LRScheduler, "step", probe.around_step)
    for name in _BUILT_BY_THEMSELVES:
        loop.replace(getattr(lr_scheduler, name), "__init__", probe.around_init)
    for event in ("optimizer_created", "finish"):
        loop.on(event, probe, getattr(probe, event))
    return lambda: None
