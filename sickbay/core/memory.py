"""Readings kept in memory, within bounds, when there is no disk to write to."""

from __future__ import annotations

from collections import deque
from typing import Any

from sickbay.core.reading import Reading

KEPT = 1000  # readings per signal: this many first ones, and as many newest ones


class Memory:
    """The first and the newest readings of each signal; `facts` and `unobserved` as a Chart has them."""

    def __init__(self) -> None:
        self.facts: dict[str, Any] = {}
        self.unobserved: dict[str, str] = {}
        self._first: dict[str, list[Reading]] = {}
        self._newest: dict[str, deque[Reading]] = {}

    def add(self, reading: Reading) -> None:
        """`reading` is kept, in the place of an older one that was neither among the first nor the newest."""
        first = self._first.setdefault(reading.signal, [])
        if len(first) < KEPT:
            first.append(reading)
        else:
            self._newest.setdefault(reading.signal, deque(maxlen=KEPT)).append(reading)

    def readings(self) -> list[Reading]:
        """All that are kept, signal by signal."""
        return [reading for signal, first in self._first.items() for reading in (*first, *self._newest.get(signal, ()))]
