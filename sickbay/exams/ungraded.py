"""What the script computed without gradient between the model's output and backward: advantages, sample weights, counts.

Autograd keeps such a value and not how it came about, so in the steps that are recorded the last of these operations
are held until the step is over, in case the loss is NaN because one of them was.
"""

from __future__ import annotations

import contextlib
from collections import deque
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from sickbay.exams.operand import kinds
from sickbay.exams.origin import storage
from sickbay.patient import user_line

MAX_OPERATIONS = 64
MAX_ELEMENTS = 1 << 14  # of an operand: per-sample numbers are few, and whatever is larger is not held
MAX_BAD_ELEMENTS = 1 << 22  # where only what is not finite is held
_NAMES = {"truediv": "div", "itruediv": "div", "rdiv": "reciprocal", "rtruediv": "reciprocal"}


@dataclass(eq=False)
class Birth:
    """The operation that made the first non-finite value: `result` from finite `operands`, at the user's line `source`.

    `writes`: the result is the first operand, overwritten.
    """

    op: str
    operands: list[tuple[str, Tensor]]
    result: Tensor
    source: str
    writes: bool = False


class Ungraded:
    """`note` each recorded call, `forget` after the step; `birth` names the operation behind a tensor that is not finite.

    `only_bad`: what is finite is not held, for which each result is read once.
    """

    def __init__(self, only_bad: bool = False) -> None:
        self._only_bad = only_bad
        self._calls: deque[Birth] = deque(maxlen=MAX_OPERATIONS)

    def note(self, function: Any, args: Any, result: Any) -> None:
        """Holds one call whose result has no history and is small. Never raises."""
        with contextlib.suppress(Exception):
            self._note(function, args, result)

    def _note(self, function: Any, args: Any, result: Any) -> None:
        if not isinstance(result, Tensor) or result.requires_grad or not result.is_floating_point():
            return
        operands = [arg for arg in args if isinstance(arg, Tensor)]
        most = MAX_BAD_ELEMENTS if self._only_bad else MAX_ELEMENTS
        if operands and all(tensor.numel() <= most for tensor in (*operands, result)) and not (self._only_bad and not kinds(result)):
            called = getattr(function, "__name__", "")
            writes = called.startswith("__i") or (called.endswith("_") and not called.endswith("__"))
            # Without their history: a graph, or a weight that the script replaces, must not outlive its place in the script.
            name, named = called.strip("_"), [(each, tensor.detach()) for each, tensor in zip(("self", "other", "third"), operands)]
            self._calls.append(Birth(_NAMES.get(name, name), named, result.detach(), user_line(), writes))

    def forget(self) -> None:
        self._calls.clear()

    def birth(self, bad: Tensor) -> Birth | None:
        """The held operation that made `bad` non-finite out of finite operands; None if it was not among them."""
        return self._births().get(storage(bad))

    def newest(self) -> Birth | None:
        """The last held operation that made something non-finite out of finite operands."""
        return next(reversed(self._births().values()), None)

    def _births(self) -> dict[int, Birth]:
        """By storage: the operation behind each held result that is not finite."""
        births: dict[int, Birth] = {}
        for call in self._calls:
            own = storage(call.result)
            if not kinds(call.result):
                continue
            read = call.operands[call.writes :]
            ill = [tensor for _, tensor in read if kinds(tensor)]
            known = [births[storage(tensor)] for tensor in ill if storage(tensor) in births]
            if known:
                births.setdefault(own, known[0])
            elif not ill and (not call.writes or any(bool((tensor == 0).any()) for _, tensor in read)):
                # What an operand was before it was overwritten is not known; a zero in the other one tells enough.
                births.setdefault(own, call)
        return births
