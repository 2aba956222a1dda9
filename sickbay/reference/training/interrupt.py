"""Ctrl-C and SIGTERM end a run after the step under way, with a checkpoint."""

from __future__ import annotations

import signal
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import Any

SIGNALS = (signal.SIGINT, signal.SIGTERM)
GRACE = 1.0  # seconds: a Ctrl-C reaches every process, and torchrun passes it on once more


class Stopped(Exception):
    """Raised when a run has ended because a signal asked it to.

    `signal`: its number. `folder`: the newest checkpoint, None = there is none. `unsaved`: why that of this step is not there.
    """

    def __init__(self, number: int, step: int, folder: Path | None, unsaved: OSError | None = None) -> None:
        self.signal, self.folder = number, folder
        lost = f"its checkpoint could not be written ({unsaved.strerror}), the newest is" if unsaved else "its checkpoint is"
        super().__init__(f"stopped by {signal.Signals(number).name} after step {step:,}; {lost} {folder or 'missing: there is none'}")


class Request:
    """The signal that asked for the end. `signal`: its number, 0 = none has."""

    def __init__(self) -> None:
        self.signal = 0


@contextmanager
def on_request(speaks: bool = True) -> Iterator[Request]:
    """Until the end of the block SIGINT and SIGTERM are noted, not obeyed; one more, GRACE seconds later, acts as it did before.

    `speaks`: say so on stderr.
    """
    request = Request()
    noted_at = 0.0
    before: dict[signal.Signals, Any] = {}

    def note(number: int, frame: FrameType | None) -> None:
        nonlocal noted_at
        if request.signal:
            if time.monotonic() - noted_at >= GRACE:
                for known, handler in before.items():
                    signal.signal(known, handler)
                signal.raise_signal(number)
            return
        request.signal, noted_at = number, time.monotonic()
        if speaks:
            name = signal.Signals(number).name
            print(f"\n{name}: ending after this step, with a checkpoint; once more ends at once", file=sys.stderr, flush=True)

    try:
        for known in SIGNALS:
            before[known] = signal.getsignal(known)
            signal.signal(known, note)
    except ValueError:  # not the main thread, whose signals are its own
        before.clear()
    try:
        yield request
    finally:
        for known, handler in before.items():
            signal.signal(known, handler)
