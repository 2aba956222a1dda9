"""Time that one probe may spend on its own looks, so that looking is rare where looking is dear."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager


class Purse:
    """A share of the run's time, and a little to begin with. `spent`: seconds of this thread's processor time so far."""

    def __init__(self, share: float, first: float) -> None:
        self.spent = 0.0
        self._share, self._first = share, first
        self._began = time.monotonic()

    def affords(self) -> bool:
        """True while less was spent than the share of the run so far and the first seconds allow."""
        return self.spent < self._first + self._share * (time.monotonic() - self._began)

    @contextmanager
    def paying(self) -> Iterator[None]:
        """What happens inside is paid for."""
        began = time.thread_time()
        try:
            yield
        finally:
            self.spent += time.thread_time() - began
