"""What a judgement looks like: evidence, a diagnosis, and the checkup that ranks them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Literal

from sickbay.core.chart import Reading
from sickbay.core.signals import SIGNALS

Severity = Literal["critical", "warning", "note"]
Certainty = Literal["confirmed", "likely", "suspected"]


class Threshold(float):
    """A number that remembers its unit and where it came from; behaves as a float everywhere else."""

    unit: str
    source: str

    def __new__(cls, value: float, unit: str, *, source: str) -> Threshold:
        if not source:
            raise ValueError("a Threshold needs a source: a paper, a page, or the calibration that gave it")
        threshold = super().__new__(cls, value)
        threshold.unit, threshold.source = unit, source
        return threshold


@dataclass(frozen=True, slots=True)
class Evidence:
    """One number against its limit. `str()` gives `grad_norm 18,400 (limit 10 L2 norm)`."""

    reading: Reading
    limit: float | None = None
    label: str = ""

    @property
    def unit(self) -> str:
        return SIGNALS[self.reading.signal].unit

    def __str__(self) -> str:
        text = f"{self.label or self.reading.signal} {number(self.reading.value)}"
        return text + (f" (limit {number(self.limit)} {self.unit})" if self.limit is not None else f" {self.unit}")


@dataclass(frozen=True, slots=True)
class Diagnosis:
    """One finding: what is wrong, where, since when, and the numbers that show it.

    `condition` and `fix` are filled in by `checkup`; a condition's `diagnose` gives the rest.
    `explains` names findings that this one accounts for beyond the condition's own `leads_to`.
    """

    summary: str
    evidence: tuple[Evidence, ...]
    severity: Severity
    step: int = 0
    where: str = ""
    source: str = ""
    certainty: Certainty = "confirmed"
    explains: tuple[str, ...] = ()
    condition: str = ""
    seconds: float = 0.0
    prescribes: str = ""


@dataclass(frozen=True, slots=True)
class NotExamined:
    """Returned by `diagnose` when the readings do not suffice to judge."""

    reason: str


@dataclass(frozen=True, slots=True)
class Checkup:
    """All verdicts over one chart: findings (root causes first), what is healthy, what could not be examined and why."""

    diagnoses: tuple[Diagnosis, ...] = ()
    healthy: tuple[str, ...] = ()
    unexamined: dict[str, str] = field(default_factory=dict)

    @property
    def verdict(self) -> Literal["sick", "healthy", "unexamined"]:
        if any(d.severity != "note" for d in self.diagnoses):
            return "sick"
        return "healthy" if self.healthy else "unexamined"


def number(value: float) -> str:
    """`value` as a person writes it: 18,400 · 0.0031 · 1.2e-09 · NaN."""
    if value != value:
        return "NaN"
    if value in (float("inf"), float("-inf")):
        return "inf" if value > 0 else "-inf"
    if value == int(value) and abs(value) < 1e6:
        return f"{int(value):,}"
    if abs(value) >= 1e6 or abs(value) < 1e-4:
        return f"{value:.2g}"
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.3g}"


def first_by_step(readings: Sequence[Reading]) -> Reading | None:
    """The earliest reading; None if there is none."""
    return min(readings, key=lambda reading: reading.step, default=None)
