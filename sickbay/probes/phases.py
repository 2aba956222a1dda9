"""Where the time of a step goes: waiting for data, forward, backward, optimizer, rest.

Stamps are taken at events that the loop tells anyway, sickbay's own time is taken out, and shares are medians over steps, so neither
an evaluation now and then nor a start-up counts. Time in which a thread was ready and had no processor counts nowhere (clock.py), neither
the script's nor that of the DataLoader's worker it waits for: a busy machine makes no wait. Cost: about fifteen microseconds a step.
"""

from __future__ import annotations

import multiprocessing.process
import os
import statistics
import time
from collections import Counter, deque
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import dataloader

from sickbay.core.record import RecordWriter
from sickbay.patient import Patient, user_line
from sickbay.probes.clock import Clock, Moment, queued_seconds
from sickbay.probes.loop import Loop
from sickbay.probes.statements import Place, Statements, data_lines, idle_copies
from sickbay.probes.unseen import unseen

SIGNALS = ("step_seconds", "data_wait", "idle_copies")
FEEDS = ("float64_gain", "loop_gain", "broadcast_gain", "attention_gain", "copy_share", "single_forwards")  # as shares of the step

PHASES = ("forward", "backward", "optimizer")
_SKIPPED = 3  # first steps: workers start, caches fill, memory is taken for the first time
_KEPT = 64  # newest steps that the medians are taken over
_ENOUGH = 5  # steps that a median needs
_REPORTS = (8, 16, 32, 64, 128, 256, 512, 1024, 2048, 4096, 8192)
_WORTH_TRACING = 0.03  # share of the step between two steps, above which it is asked which of the script's lines take it
_TRACED = 3  # stretches whose lines are timed
_ATTEMPTS = 8
_ASKED_EVERY = 4  # steps between two thoughts of tracing
_IDLES = 3.0  # without a clock of the queue: a stretch this many times longer than its computing would have taken beside the step's rest
_TRIMMED = 0.1  # share of the steps, those that waited longest: the start of an epoch, workers spinning up
_LONG = 0.001  # seconds asleep in a loader with workers, above which it is asked whether they had a processor
_RECENT = 32  # batches that are looked back on for such a wait
_HELPED = 0.1  # of a sleep: processor time of the script's other threads meanwhile, so that it may be them that are waited for


@dataclass
class Stretch:
    """Seconds of a stretch of the step, without those in which the thread had no processor: `cpu` computing, `slept` not."""

    cpu: float = 0.0
    slept: float = 0.0

    @property
    def seconds(self) -> float:
        return self.cpu + self.slept

    def add(self, cpu: float, slept: float) -> None:
        self.cpu, self.slept = self.cpu + cpu, self.slept + slept


@dataclass
class Step:
    """Seconds of one step. `gap`: from the end of a step or backward to the next forward; `loader`: inside a DataLoader's next.

    `wall`: all that passed, `queued`: those without a processor, `cpu`: the training thread's own. `rows`: what loaders were asked for.
    """

    wall: float = 0.0
    cpu: float = 0.0
    queued: float = 0.0
    rows: int = 0
    gap: Stretch = field(default_factory=Stretch)
    loader: Stretch = field(default_factory=Stretch)
    phases: dict[str, float] = field(default_factory=lambda: dict.fromkeys(PHASES, 0.0))

    @property
    def clear(self) -> float:
        return max(1e-9, self.wall - self.queued)

    @property
    def rest(self) -> float:
        """Seconds outside gap and loader, without those in which the thread had no processor."""
        return max(0.0, self.clear - self.gap.seconds - self.loader.seconds)

    def slowed(self) -> float:
        """How many times longer the step's computing took than it computed: other programs had the processor."""
        asleep = self.gap.slept + self.loader.slept
        return max(1.0, (self.wall - asleep) / self.cpu) if self.cpu > 0 else 1.0


@dataclass
class Fetching:
    """The newest DataLoader iteration: how it loads and the user's line that drives it."""

    workers: int = 0
    dataset: str = ""
    source: str = ""


class Phases:
    """Stamps the loop's events and writes medians over the newest steps."""

    SIGNALS = SIGNALS

    def __init__(self, patient: Patient, record: RecordWriter, loop: Loop) -> None:
        self.patient, self.record, self.loop = patient, record, loop
        self.fetching = Fetching()
        self._steps: list[Step] = []
        self._step = Step()
        self._count = 0
        self._depth = 0
        self.clock = Clock()
        self.statements = Statements(self.clock)
        self._gap: Moment | None = None
        self._began: Moment | None = None
        self._phase: tuple[str, float] | None = None
        self._fetches = Moment()  # all that passed inside loaders so far
        self._inside = Moment()  # the same, at the beginning of the gap
        self._others = 0.0  # processor seconds of the process's other threads, then
        self._waits: deque[float] = deque(maxlen=_RECENT)  # seconds asleep in the loader
        self._own_at_begin = 0.0
        self._tracing = False
        self._attempts = 0
        self._stretches: list[tuple[float, dict[Place, float], set[Place], set[Place]]] = []

    def _now(self) -> Moment:
        """The clock without sickbay's own seconds."""
        now = self.clock.now()
        now.passed -= self.loop.seconds
        return now

    def _asleep(self, passed: Moment, slowed: float) -> float:
        """Seconds of a stretch that the thread neither computed nor stood in the queue; what a busy machine can explain is 0."""
        seconds = max(0.0, passed.clear - passed.cpu)
        return seconds if self.clock.exact or passed.passed > _IDLES * passed.cpu * slowed else 0.0

    def _slowed(self) -> float:
        """The newest step's slowing down by other programs."""
        return self._steps[-1].slowed() if self._steps else 1.0

    def _shared(self, asleep: float, process: float) -> float:
        """`asleep` as it would have been on a quiet machine, where the script's own threads or processes may have been waited for."""
        helped = bool(multiprocessing.process._children) or process > _HELPED * asleep  # type: ignore[attr-defined]
        return asleep / self._slowed() if helped else asleep

    # --- the loader ---------------------------------------------------------------------------------------------------
    def around_next(self, original: Any) -> Any:
        @unseen
        def __next__(iterator: Any) -> Any:
            if self._depth or self.loop.pace.resting or not self.loop.awake():
                return original(iterator)
            before, others, worker, queued = None, 0.0, 0, None
            with self.loop.sheltered("next", self):
                worker = _worker_of(iterator) if max(self._waits, default=_LONG) >= _LONG else 0
                queued = queued_seconds(worker) if worker else None
                before, others = self.clock.now(), time.process_time()
            if before is None:
                return original(iterator)
            self._depth += 1
            try:
                return original(iterator)
            finally:
                self._depth -= 1
                with self.loop.sheltered("next", self):
                    self._fetched(iterator, self.clock.now().since(before), time.process_time() - others, worker, queued)

        return __next__

    def _fetched(self, iterator: Any, passed: Moment, process: float, worker: int, queued: float | None) -> None:
        workers = int(getattr(iterator, "_num_workers", 0))
        asleep = self._asleep(passed, self._slowed())
        self._waits.append(asleep)
        if not workers:
            asleep = self._shared(asleep, process - passed.cpu)
        elif asleep >= _LONG and self.clock.exact:
            after = queued_seconds(worker) if worker else None
            # A share, not a difference: while the training thread itself is queued, the worker goes on being queued.
            asleep *= max(0.0, 1 - (after - queued) / passed.passed) if after is not None and queued is not None else 0.0
        elif asleep >= _LONG:
            asleep /= self._slowed()
        self._step.loader.add(passed.cpu, asleep)
        self._step.rows += getattr(getattr(iterator, "_index_sampler", None), "batch_size", None) or 0
        self._fetches = self._fetches.plus(passed)
        self.statements.excuse(passed.clear)
        if not self.fetching.source:
            dataset = type(getattr(iterator, "_dataset", None)).__name__
            self.fetching = Fetching(workers, dataset, user_line(2))

    # --- the loop's events ----------------------------------------------------------------------------------------------
    def forward_begin(self, call: Any) -> None:
        if self._tracing:
            self._tracing = False
            self._keep_stretch(self.statements.end(), call)
        if self._gap is not None:
            if call.grad_enabled:
                self._close_gap(self._gap)
                if self._count in (_SKIPPED, _SKIPPED + 2):
                    self.statements.learn()
            self._gap = None
        self._enter("forward")

    def forward_end(self, call: Any, output: Any) -> None:
        self._leave()

    def backward_begin(self, loss: Tensor | None, kind: str) -> None:
        self._enter("backward")

    def backward_end(self, loss: Tensor | None, kind: str) -> None:
        self._leave()
        self._open_gap()

    def step_begin(self, optimizer: Any, late: bool) -> None:
        self._gap = None
        if not late:
            self._enter("optimizer")

    def step_end(self, optimizer: Any) -> None:
        self._leave()

    def round_end(self, step: int) -> None:
        resting, rests_next = self.loop.pace.resting, self.loop.pace.rests_next
        now = None if resting and rests_next else self._now()
        if self._began is not None and now is not None and not resting:
            passed = now.since(self._began)
            self._step.wall, self._step.cpu, self._step.queued = passed.passed, passed.cpu, passed.queued
            if self._count > _SKIPPED:
                self._steps.append(self._step)
                del self._steps[:-_KEPT]
        self._began, self._step, self._phase, self._gap = None, Step(), None, None
        self._count += 1
        if self._count in _REPORTS:
            self._write()
        if now is not None and not rests_next:
            self._began = now
            self._open_gap(now)
            self._trace()

    def slept(self, nap: Any) -> None:
        self._count += 1

    def finish(self) -> None:
        self._write()

    def _enter(self, phase: str) -> None:
        self._phase = (phase, time.perf_counter() - self.loop.seconds)

    def _leave(self) -> None:
        if self._phase is not None:
            phase, since = self._phase
            self._step.phases[phase] += time.perf_counter() - self.loop.seconds - since
            self._phase = None

    def _open_gap(self, now: Moment | None = None) -> None:
        self._gap = now or self._now()
        self._inside = self._fetches
        self._others = time.process_time() - self._gap.cpu

    def _close_gap(self, began: Moment) -> None:
        now = self._now()
        others = time.process_time() - now.cpu - self._others
        passed = now.since(began).since(self._fetches.since(self._inside))
        asleep = self._asleep(passed, self._slowed())
        self._step.gap.add(max(0.0, passed.cpu), self._shared(asleep, others) if asleep else 0.0)

    def compute_share(self) -> float:
        """The share of a step's time in forward and backward, median over the steps so far; 1 where none was timed."""
        steps = [step for step in self._steps if step.wall > 0]
        if not steps:
            return 1.0
        return min(1.0, statistics.median((step.phases["forward"] + step.phases["backward"]) / step.wall for step in steps))

    # --- which lines ----------------------------------------------------------------------------------------------------
    def _trace(self) -> None:
        """The lines up to the next forward are timed, where enough of the step passes between steps to be worth a look."""
        if self._count % _ASKED_EVERY or len(self._stretches) >= _TRACED or self._attempts >= _ATTEMPTS or len(self._steps) < _ENOUGH:
            return
        if statistics.median(s.gap.seconds / s.clear for s in self._steps) < _WORTH_TRACING:
            return
        self._attempts += 1
        self._own_at_begin = self.loop.seconds
        self._tracing = self.statements.begin()

    def _keep_stretch(self, stretch: Any, call: Any) -> None:
        if stretch is None or not call.grad_enabled or not stretch.spent:
            return
        first = next(iter(stretch.spent))
        stretch.spent[first] = max(0.0, stretch.spent[first] - (self.loop.seconds - self._own_at_begin))
        losses = [loss for loss in self.patient.losses if loss.grad_enabled]
        source = losses[-1].source if losses else self._loss_source
        self._stretches.append((sum(stretch.spent.values()), stretch.spent, data_lines(stretch, source), idle_copies(stretch)))

    _loss_source = ""

    def loss(self, call: Any) -> None:
        if not self._loss_source and call.grad_enabled:
            self._loss_source = call.source

    def _share_of(self, which: int) -> tuple[float, str]:
        """The share of the traced stretches that lines of one kind took, and the costliest of them as file:line."""
        by_line: Counter[Place] = Counter()
        total = 0.0
        for whole, spent, data, copies in self._stretches:
            total += whole
            for place in (data, copies)[which]:
                by_line[place] += max(0.0, spent.get(place, 0.0))  # type: ignore[assignment]
        if not by_line or total <= 0:
            return 0.0, ""
        (file, _, line), _ = by_line.most_common(1)[0]
        return min(1.0, sum(by_line.values()) / total), f"{file}:{line}"

    # --- what is written --------------------------------------------------------------------------------------------------
    def _write(self) -> None:
        steps = [step for step in self._steps if step.wall > 0]
        if len(steps) < _ENOUGH:
            return
        wall = statistics.median(step.wall for step in steps)
        shares = {phase: round(statistics.median(step.phases[phase] / step.wall for step in steps), 4) for phase in PHASES}
        self.record.read("step_seconds", wall, note={**shares, "steps": len(steps)})
        own, line = self._share_of(0)
        # Processor seconds do not depend on what else the machine does; a device or other ranks are waited for in wall seconds.
        alone = int(os.environ.get("WORLD_SIZE") or 1) == 1 and not torch.cuda.is_initialized()
        rest = _low([(s.cpu - s.loader.cpu - s.gap.cpu * own) if alone else (s.rest + s.gap.seconds * (1 - own)) for s in steps])
        idle = [s.loader.slept for s in steps]
        loading = _low([s.loader.cpu for s in steps]) + (_usual(idle) if self.fetching.workers else statistics.median(idle))
        making = _low([s.gap.cpu * own for s in steps]) + statistics.median(s.gap.slept * own for s in steps)
        computed = _low([s.loader.cpu + s.gap.cpu * own for s in steps])
        spent, by_loader = loading + making, loading >= making
        note = {
            "seconds": spent,
            "step_seconds": spent + rest,
            "loader": by_loader,
            "workers": self.fetching.workers if by_loader else 0,
            "dataset": self.fetching.dataset if by_loader else "",
            "idle": round(1 - min(1.0, computed / spent), 3) if spent > 0 else 0.0,
            "steps": len(steps),
            "rows": int(statistics.median(step.rows for step in steps)) if by_loader else 0,
        }
        share = spent / (spent + rest) if spent + rest > 0 else 0.0
        self.record.read("data_wait", share, note=note, source=self.fetching.source if by_loader else line)
        copied, line = self._share_of(1)
        share = statistics.median(step.gap.seconds / step.clear for step in steps) * copied
        self.record.read("idle_copies", share, note={"seconds": share * wall, "step_seconds": wall}, source=line)


def _worker_of(iterator: Any) -> int:
    """The process that makes the loader's next batch; 0 where that is not known."""
    try:
        index = iterator._task_info[iterator._rcvd_idx][0]
        return int(iterator._workers[index].pid)
    except (AttributeError, KeyError, IndexError, TypeError):
        return 0


def _low(seconds: list[float]) -> float:
    """The lower quartile: what a stretch takes when nothing disturbs it."""
    return max(0.0, sorted(seconds)[len(seconds) // 4])


def _usual(seconds: list[float]) -> float:
    """The mean without the largest: batches that come in bunches are waited for by turns."""
    kept = sorted(seconds)[: max(1, int(len(seconds) * (1 - _TRIMMED)))]
    return sum(kept) / len(kept)


def attach(patient: Patient, record: RecordWriter, loop: Loop) -> Callable[[], None]:
    """From now on the phases of each step are timed."""
    probe = Phases(patient, record, loop)
    events = (
        "forward_begin",
        "forward_end",
        "loss",
        "backward_begin",
        "backward_end",
        "step_begin",
        "step_end",
        "round_end",
        "slept",
        "finish",
    )
    for event in events:
        loop.on(event, probe, getattr(probe, event))
    loop.rests(probe, but=("round_end",))
    loop.sleeps(probe)
    patient.compute_share = probe.compute_share
    loop.replace(dataloader._BaseDataLoaderIter, "__next__", probe.around_next)

    def detach() -> None:
        probe.statements.end()
        probe.clock.close()

    return detach
