"""Who is told what happens in a training loop, what a probe may miss of it, and what becomes of a probe that fails."""

from __future__ import annotations

import contextlib
import time
import traceback
from collections.abc import Callable
from types import TracebackType
from typing import Any

from sickbay.core.record import RecordWriter
from sickbay.patient import Patient
from sickbay.probes.nap import Nap
from sickbay.probes.pace import Pace
from sickbay.probes.unseen import modes_present, out_of_sight

_MAX_PROBLEMS = 32
_MAX_EVENTS = 512  # noted of a step; one that may be slept through has fewer
_OF_A_STEP = frozenset(("forward_begin", "forward_end", "loss", "outgrown", "backward_asked", "backward_begin", "backward_end", "clip"))
_OF_A_STEP |= {"closure_begin", "step_begin", "step_end", "round_end"}


class Sheltered:
    """What `Events.sheltered` gives; a class of its own because it is entered several times a step."""

    __slots__ = ("_event", "_events", "_probe", "_sight")

    def __init__(self, events: Events, event: str, probe: Any) -> None:
        self._events, self._event, self._probe, self._sight = events, event, probe, out_of_sight()

    def __enter__(self) -> None:
        self._sight.__enter__()

    def __exit__(self, kind: type[BaseException] | None, problem: BaseException | None, traceback: TracebackType | None) -> bool:
        self._sight.__exit__(kind, problem, traceback)
        if not isinstance(problem, Exception):
            return False
        self._events.drop(self._probe, self._event, problem)
        return True


class Events:
    """Emits events to listeners; a listener that raises is dropped and named in the report, and the script never notices.

    `happened`: the events of the step in progress. `nap`: the step in progress where it is slept through. `seconds`: spent listening.
    """

    def __init__(self, patient: Patient, record: RecordWriter) -> None:
        self.patient, self.record = patient, record
        self.seconds = 0.0
        self.pace = Pace()
        self.nap: Nap | None = None
        self.happened: list[str] = []
        self.problems: list[dict[str, Any]] = []
        self._listeners: dict[str, list[tuple[Any, Callable[..., None]]]] = {}
        self._told: dict[tuple[str, bool], tuple[tuple[Any, Callable[..., None]], ...]] = {}
        self._resting: dict[Any, frozenset[str]] = {}
        self._sleepers: dict[Any, frozenset[str]] = {}
        self._all_sleep: bool | None = None
        self._failed_before: set[tuple[str, str]] = set()

    def on(self, event: str, probe: Any, listener: Callable[..., None]) -> None:
        """`listener` is called once at every `event`, however often this was said, until its probe fails once."""
        listeners = self._listeners.setdefault(event, [])
        if (probe, listener) not in listeners:
            listeners.append((probe, listener))
            self._listeners_changed()

    def off(self, event: str, probe: Any) -> None:
        """`probe` hears no `event` any more."""
        listeners = self._listeners.get(event, [])
        listeners[:] = [(owner, listener) for owner, listener in listeners if owner is not probe]
        self._listeners_changed()

    def rests(self, probe: Any, but: tuple[str, ...] = ()) -> None:
        """From now on `probe` hears nothing of the steps that are only glanced at, from their first event to their last, `but` these.

        Whatever is called in such a step is no longer in the processor's caches, and costs several times its usual time.
        """
        self._resting[probe] = _OF_A_STEP.difference(but)
        self._listeners_changed()

    def sleeps(self, probe: Any, through: tuple[str, ...] = tuple(_OF_A_STEP)) -> None:
        """`probe` may miss the events `through` of some steps; none is slept through while anyone hears others in a step glanced at."""
        self._sleepers[probe] = frozenset(through)
        self._listeners_changed()

    def _listeners_changed(self) -> None:
        self._told.clear()
        self._all_sleep = None

    def emit(self, event: str, *args: Any) -> None:
        """Tell all listeners; never raises. A mode that the script has switched on sees nothing of what they compute."""
        if self.nap is not None:
            self.wake()
        resting = self.pace.resting and event in _OF_A_STEP
        if len(self.happened) < _MAX_EVENTS:
            self.happened.append(event)
        listeners = self._told.get((event, resting))
        if listeners is None:
            everyone = self._listeners.get(event, ())
            listeners = tuple((probe, told) for probe, told in everyone if not (resting and event in self._resting.get(probe, ())))
            self._told[event, resting] = listeners
        if not listeners:
            return
        began = time.perf_counter()
        with out_of_sight():
            for probe, listener in listeners:
                try:
                    listener(*args)
                except Exception as problem:
                    self.drop(probe, event, problem)
        self.seconds += time.perf_counter() - began

    def sheltered(self, event: str, probe: Any = None) -> Sheltered:
        """An exception inside is named in the report, `probe` listens no more, and it goes no further; no mode of the script's sees it."""
        return Sheltered(self, event, probe or self)

    def failed(self, event: str, problem: Exception) -> None:
        """Something of the loop's own went wrong at `event`; it goes on."""
        self.drop(self, event, problem)

    def drop(self, probe: Any, event: str, problem: Exception) -> None:
        """`probe` listens no more, and the report says why. Never raises."""
        name = getattr(probe, "__name__", type(probe).__name__).rsplit(".", 1)[-1]
        for heard in self._listeners:
            self.off(heard, probe)
        text = self.note_problem(name, event, problem)
        for signal in getattr(probe, "SIGNALS", ()):
            with contextlib.suppress(Exception):
                self.record.unobserved(signal, f"the {name} probe failed at step {self.record.step}: {text[:120]}")

    def note_problem(self, name: str, event: str, problem: Exception) -> str:
        """`problem` is among the report's problems, once for each `name` and `event`; the text that describes it. Never raises."""
        text = type(problem).__name__
        with contextlib.suppress(Exception):
            where = traceback.extract_tb(problem.__traceback__)[-1]
            text = f"{text}: {problem} ({where.filename.rsplit('/', 1)[-1]}:{where.lineno})"
        if (name, event) not in self._failed_before and len(self.problems) < _MAX_PROBLEMS:
            self._failed_before.add((name, event))
            self.problems.append({"probe": name, "event": event, "step": self.record.step, "error": text[:300]})
            with contextlib.suppress(Exception):
                self.record.fact("problems", self.problems)
        return text

    # --- steps slept through ------------------------------------------------------------------------------------------
    def all_may_sleep(self) -> bool:
        """True if nobody has to hear the events of a step that is glanced at."""
        if self._all_sleep is None:
            self._all_sleep = all(
                event in self._sleepers.get(probe, ()) or event in self._resting.get(probe, ())
                for event in _OF_A_STEP
                for probe, _ in self._listeners.get(event, ())
            )
        return self._all_sleep

    def tell_slept(self, nap: Nap) -> None:
        """Tell the listeners of "slept", which is `emit` at a fraction of its cost."""
        for probe, listener in tuple(self._listeners.get("slept", ())):
            try:
                listener(nap)
            except Exception as problem:
                self.drop(probe, "slept", problem)

    def wake(self) -> None:
        """The step in progress is slept through no longer: what was known of it is told, and its remaining events will be."""
        nap, self.nap = self.nap, None
        if nap is None or nap.stage == "idle":
            return
        with self.sheltered("woken"):
            call = nap.call()
            if call is not None:
                self.patient.admit(call)
            self.emit("woken", nap)

    def stays_asleep(self, event: str, probe: Any, is_plain: Callable[..., bool], *given: Any) -> bool:
        """True if `is_plain(*given)`: what happens is what a plain step does next. Otherwise the step is slept through no longer."""
        try:
            if modes_present():
                with out_of_sight():
                    plain = is_plain(*given)
            else:
                plain = is_plain(*given)
            if not plain:
                self.wake()
            return plain
        except Exception as problem:
            self.drop(probe, event, problem)
            return False
