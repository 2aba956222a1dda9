"""The birth of a non-finite value, read from the note of a `first_nonfinite` reading.

Which operation made the first NaN or infinity, in which phase of the step, from which operands: the conditions that
ask "what made it" all read this one view, so that the note's form is known in one place.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from sickbay.core.chart import Reading

FORWARD = ("forward", "loss", "data")
UPDATE = ("weight", "update")  # what a NaN of an earlier step comes to, unless it was born there
LARGEST_FINITE = {"float16": 65504.0, "bfloat16": 3.389e38, "float32": 3.403e38, "float64": 1.798e308}  # IEEE 754-2019, table 3.5
HIGHEST_POWER = 4  # the largest exponent in common use: kurtosis, GELU's cube
_WRAPPING = re.compile(r"(^aten(::|\.)|^_+|Backward\d*$|_+$)")


@dataclass(frozen=True, slots=True)
class Operand:
    """One operand. `low`, `high`: its finite range, NaN where unknown; `nonfinite`, `zeros`: elements that are so."""

    name: str
    shape: tuple[int, ...]
    low: float
    high: float
    nonfinite: int
    zeros: int

    @property
    def largest(self) -> float:
        """The largest magnitude; NaN where unknown."""
        return max(abs(self.low), abs(self.high))

    @property
    def empty(self) -> bool:
        return 0 in self.shape


@dataclass(frozen=True, slots=True)
class Origin:
    """The first operation with a non-finite result. `op` is its bare name (`exp` for `aten.exp.default` and `ExpBackward0`)."""

    reading: Reading
    op: str
    phase: str
    dtype: str
    operands: tuple[Operand, ...]
    chain: tuple[str, ...]

    @property
    def forward(self) -> bool:
        """True where the value was born going forward, before the model, in it or in the loss."""
        return self.phase in FORWARD

    @property
    def first(self) -> Operand:
        """The first operand; one of unknown range where none was kept."""
        return self.operands[0] if self.operands else Operand("", (), math.nan, math.nan, 0, 0)

    @property
    def divisor(self) -> Operand:
        """The second operand of a division, or the only one."""
        return self.operands[1] if len(self.operands) > 1 else self.first

    @property
    def largest(self) -> float:
        """The largest magnitude among the operands; NaN where unknown."""
        return max((operand.largest for operand in self.operands if operand.largest == operand.largest), default=math.nan)

    @property
    def may_outgrow(self) -> bool:
        """True where a common power of the largest operand leaves the format; a power of smaller operands fails at 0 or below instead."""
        limit: float = LARGEST_FINITE.get(self.dtype, LARGEST_FINITE["float32"]) ** (1 / HIGHEST_POWER)
        return self.largest > limit

    @property
    def place(self) -> str:
        """Where it happened, for a sentence: the module's path, or the phase."""
        again = self.reading.note.get("seen_again")
        if again is not None:
            return f"what comes before the model (these numbers are step {again}'s, where it did so again)"
        return self.reading.where or {"loss": "the loss", "backward": "the backward pass"}.get(self.phase, "the model")


def origins(readings: Iterable[Reading]) -> list[Origin]:
    """The `first_nonfinite` readings as origins, in order of step."""
    return [_origin(reading) for reading in sorted(readings, key=lambda reading: reading.step)]


def bare_name(op: str) -> str:
    """`exp` for `aten.exp.default`, `aten::exp_`, `torch.exp`, `ExpBackward0`; `log_softmax` for `_log_softmax`, `LogSoftmaxBackward0`."""
    name = op.strip()
    if name.startswith("torch."):
        name = name.rsplit(".", 1)[1]
    while (shorter := _WRAPPING.sub("", name)) != name:
        name = shorter
    name = name.split(".")[0].rstrip("_")
    return re.sub(r"(?<=[a-z])(?=[A-Z])", "_", name).lower()


def _origin(reading: Reading) -> Origin:
    note = reading.note
    operands = tuple(_operand(entry) for entry in note.get("operands") or ())
    result = note.get("result") or {}
    dtype = str(result.get("dtype") or note.get("dtype") or "").removeprefix("torch.")
    chain = tuple(bare_name(str(name)) for name in note.get("chain") or ())
    return Origin(reading, bare_name(str(note.get("op", ""))), str(note.get("phase", "")), dtype, operands, chain)


def _operand(entry: Mapping[str, Any]) -> Operand:
    return Operand(
        name=str(entry.get("name") or ""),
        shape=tuple(int(size) for size in entry.get("shape") or ()),
        low=_number(entry.get("min")),
        high=_number(entry.get("max")),
        nonfinite=int(entry.get("nonfinite") or 0),
        zeros=int(entry.get("zeros") or 0),
    )


def _number(value: Any) -> float:
    try:
        return float(value)
    except (TypeError, ValueError):
        return math.nan
