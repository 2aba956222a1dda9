"""Readings kept in memory, within bounds, when there is no disk to write to."""

from __future__ import annotations

from collections import deque
from collections.abc import Mapping
from typing import Any

import numpy as np

from sickbay.core.database import EVENT, FACT, STEP, UNOBSERVED, Statement
from sickbay.core.json_text import from_text
from sickbay.core.packing import SCALAR, Row, unpack_extras
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

    def take(self, statement: Statement, channels: Mapping[int, tuple[str, str, str]]) -> None:
        """What `statement` would have written is kept; `channels`: (signal, where, source) by the numbers that steps name them by."""
        sql, values = statement
        if sql is FACT:
            self.facts[values[0]] = from_text(values[1])
        elif sql is UNOBSERVED:
            self.unobserved[values[0]] = values[1]
        elif sql is EVENT:
            _, _, step, signal, value, where, note, source, seconds = values
            self.add(Reading(step, signal, value, where, from_text(note) if note else {}, source, seconds))
        elif sql is STEP:
            row = Row(*values)
            plain = [(channel, row.first, value, None) for channel, value in np.frombuffer(row.scalars, SCALAR).tolist()]
            for channel, step, value, note in (*plain, *unpack_extras(row.extras)):
                signal, where, source = channels[channel]
                self.add(Reading(step, signal, value, where, note or {}, source, row.seconds))

    def readings(self) -> list[Reading]:
        """All that are kept, signal by signal."""
        return [reading for signal, first in self._first.items() for reading in (*first, *self._newest.get(signal, ()))]
