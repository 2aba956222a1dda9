"""Decides which steps are looked at closely, so that looking stays a small share of the run's time whatever the size of the model."""

from __future__ import annotations

import math
import statistics
import time
from collections import deque

CLOSELY = 64  # steps from the start, and after each new optimizer, that are all looked at closely
BUDGET = 0.004  # of a step's time, for what a close look costs beyond an ordinary step
RAREST = 31  # steps: a close look is never rarer than this
_KEPT = 15  # newest timings that the medians are taken over


class Pace:
    """`resting`: True during steps that are only glanced at (loss, gradient norm, non-finite values)."""

    def __init__(self) -> None:
        self.resting = False
        self.every = 1
        self._steps = 0
        self._ended = 0.0
        self._own = 0.0
        self._walls: deque[float] = deque(maxlen=_KEPT)
        self._costs: dict[bool, deque[float]] = {True: deque(maxlen=_KEPT), False: deque(maxlen=_KEPT)}

    @property
    def steps(self) -> int:
        """Steps since the start or, if that is later, since the newest optimizer was made: where a second training begins, it is 0."""
        return self._steps

    @property
    def rests_next(self) -> bool:
        """True if the step after this one will only be glanced at, as far as is known."""
        return self._glances_at(self._steps + 1)

    def wake(self) -> None:
        """Something new has begun: the next steps are looked at closely."""
        self.resting, self._steps = False, 0

    def step_over(self, own: float, may_rest: bool = True) -> None:
        """One step is over; `own`: seconds spent watching so far, exams left out. `may_rest`: False = the next is looked at closely."""
        now = time.perf_counter()
        if self._ended:
            self._walls.append(now - self._ended)
            self._costs[self.resting].append(own - self._own)
        self._ended, self._own = now, own
        self._steps += 1
        if self._steps >= CLOSELY and self._steps % _KEPT == 0:
            self._choose()
        self.resting = may_rest and self._glances_at(self._steps)

    def _glances_at(self, step: int) -> bool:
        return step >= CLOSELY and step % self.every != 0

    def _choose(self) -> None:
        glance = statistics.median(self._costs[True]) if self._costs[True] else 0.0
        extra = max(0.0, statistics.median(self._costs[False]) - glance)
        # An odd number: loaders hand out batches in bunches of two, four or eight, and none of a bunch may escape for ever.
        self.every = min(RAREST, max(1, math.ceil(extra / (BUDGET * statistics.median(self._walls)))) | 1)
