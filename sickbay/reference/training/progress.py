"""How a run tells its progress, on stderr."""

from __future__ import annotations

import math
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager

from sickbay.reference.settings.recipe import Recipe


class Progress:
    """One line on stderr, rewritten in place on a terminal and repeated now and then elsewhere. `every`: steps between two.

    `bytes_per_token`: None = losses are not of the text, and are told in perplexity.
    `speaks`: False = nothing is written, as by all but one of the processes of a run.
    """

    def __init__(self, first: int, recipe: Recipe, *, tokens_per_step: float, bytes_per_token: float | None, speaks: bool = True) -> None:
        self.speaks = speaks
        self.terminal = sys.stderr.isatty()
        self.every = 10 if self.terminal else 100
        self._first, self._steps = first, recipe.steps
        self._tokens_per_step, self._bytes_per_token = tokens_per_step, bytes_per_token
        self._started = time.perf_counter()
        self._aside = 0.0

    @contextmanager
    def aside(self) -> Iterator[None]:
        """What is inside is no training: its seconds do not count in tokens_per_second."""
        began = time.perf_counter()
        yield
        self._aside += time.perf_counter() - began

    def seconds(self) -> float:
        return time.perf_counter() - self._started

    def tokens_per_second(self, done: int) -> float:
        """Since the start, of the steps alone."""
        return (done - self._first) * self._tokens_per_step / max(self.seconds() - self._aside, 1e-9)

    def bits_per_byte(self, loss: float) -> float | None:
        """`loss` nats per token in bits per UTF-8 byte of the text, which does not depend on the tokenizer; None as `bytes_per_token`."""
        return None if self._bytes_per_token is None else loss / math.log(2) / self._bytes_per_token

    def show(self, done: int, loss: float) -> None:
        left = (self._steps - done) * self.seconds() / (done - self._first)
        speed = f"{self.tokens_per_second(done):,.0f} tokens/s  ETA {clock(left)}"
        self._write(done, f"loss {self._told(loss)}  {speed}", stays=done == self._steps)

    def show_validation(self, done: int, loss: float) -> None:
        self._write(done, f"validation loss {self._told(loss)}", stays=True)

    def say(self, done: int, text: str) -> None:
        self._write(done, text, stays=True)

    def _told(self, loss: float) -> str:
        bits = self.bits_per_byte(loss)
        return f"{loss:.4f}  " + (f"perplexity {math.exp(min(loss, 700.0)):,.2f}" if bits is None else f"{bits:.3f} bits per byte")

    def _write(self, done: int, numbers: str, stays: bool) -> None:
        if not self.speaks:
            return
        text = f"step {done:,}/{self._steps:,}  {numbers}"
        clear, end = ("\r\x1b[K", "\n" if stays else "") if self.terminal else ("", "\n")
        print(f"{clear}{text}", end=end, file=sys.stderr, flush=True)


def clock(seconds: float) -> str:
    """Minutes and seconds, `m:ss`, or `h:mm:ss` from an hour on."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{rest:02d}" if hours else f"{minutes}:{rest:02d}"
