"""Ctrl-C and SIGTERM end a run after the step under way, with a checkpoint."""

from __future__ import annotations

import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType

SIGNALS = (signal.SIGINT, signal.SIGTERM)


class Stopped(Exception):
    """Raised when a run has ended because a signal asked it to. `signal`: its number; `folder`: the newest checkpoint, None = none."""

    def __init__(self, number: int, step: int, folder: Path | None) -> None:
        self.signal, self.folder = number, folder
        saved = f"its checkpoint is {folder}" if folder else "no checkpoint could be written"
        super().__init__(f"stopped by {signal.Signals(number).name} after step {step:,}; {saved}")


class Request:
    """The signal that asked for the end. `signal`: its number, 0 = none has."""

    def __init__(self) -> None:
        self.signal = 0


@contextmanager
def on_request() -> Iterator[Request]:
    """Until the end of the block SIGINT and SIGTERM are noted, not obeyed; a second one acts as it did before."""
    request = Request()
    before = {}

    def note(number: int, frame: FrameType | None) -> None:
        request.signal = number
        for known, handler in before.items():
            signal.signal(known, handler)
        print(
            f"\n{signal.Signals(number).name}: ending after this step, with a checkpoint; once more ends at once",
            file=sys.stderr,
            flush=True,
        )

    try:
        for number in SIGNALS:
            before[number] = signal.getsignal(number)
            signal.signal(number, note)
    except ValueError:  # not the main thread, whose signals are its own
        before.clear()
    try:
        yield request
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
