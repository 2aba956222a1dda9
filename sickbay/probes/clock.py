"""A clock that other programs cannot slow: it stands still while the thread is ready to run and has no processor.

Linux counts for each thread how long it stood in the run queue (Documentation/scheduler/sched-stats.rst, /proc/<pid>/schedstat: nanoseconds
on a processor, nanoseconds waited for one, turns). What is left of the time that passed was computing or sleeping. Elsewhere the clock is
the ordinary one, and `exact` is False. Cost: two microseconds a reading.
"""

from __future__ import annotations

import contextlib
import os
import time
from dataclasses import dataclass


@dataclass(slots=True)
class Moment:
    """Seconds: `passed` on the wall, `cpu` of this thread, `queued` waiting for a processor."""

    passed: float = 0.0
    cpu: float = 0.0
    queued: float = 0.0

    @property
    def clear(self) -> float:
        """Seconds spent computing or sleeping."""
        return self.passed - self.queued

    def since(self, earlier: Moment) -> Moment:
        """The seconds between two moments."""
        return Moment(self.passed - earlier.passed, self.cpu - earlier.cpu, self.queued - earlier.queued)

    def plus(self, other: Moment) -> Moment:
        """Two stretches together."""
        return Moment(self.passed + other.passed, self.cpu + other.cpu, self.queued + other.queued)


class Clock:
    """Reads the calling thread's moments; belongs to the thread that made it."""

    def __init__(self) -> None:
        self._file = -1
        with contextlib.suppress(OSError):
            self._file = os.open("/proc/thread-self/schedstat", os.O_RDONLY | os.O_CLOEXEC)
        self.exact = self._file >= 0 and self._queued() is not None

    def now(self) -> Moment:
        """This moment; without `exact`, nothing is known of queueing and it counts as time passed."""
        queued = self._queued() if self.exact else 0.0
        if queued is None:  # the script closed every descriptor
            self.exact, queued = False, 0.0
        return Moment(time.perf_counter(), time.thread_time(), queued)

    def close(self) -> None:
        """The descriptor is given back."""
        if self._file >= 0:
            with contextlib.suppress(OSError):
                os.close(self._file)
        self._file, self.exact = -1, False

    def _queued(self) -> float | None:
        try:
            fields = os.pread(self._file, 80, 0).split()
            return int(fields[1]) * 1e-9 if len(fields) == 3 else None
        except (OSError, ValueError):
            return None


def queued_seconds(process: int) -> float | None:
    """Seconds that all threads of `process` together have waited for a processor; None where the system does not tell."""
    folder = f"/proc/{process}/task"
    total = 0
    try:
        for thread in os.listdir(folder):
            with open(f"{folder}/{thread}/schedstat", "rb") as file:
                total += int(file.read().split()[1])
    except (OSError, ValueError, IndexError):
        return None
    return total * 1e-9
