"""Shows sickbay at work on the reference: a healthy run, then faults planted one by one, each found, and gone once it is taken out.

Nothing here is staged: every run goes through `watch`, and what is told is read from its checkup.
"""

from __future__ import annotations

import itertools
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from torch import Tensor

from sickbay.core.chart import Chart
from sickbay.core.condition import Condition
from sickbay.core.diagnosis import Checkup, Diagnosis
from sickbay.core.errors import UsageError
from sickbay.core.reader import load_chart
from sickbay.reference.case import Case
from sickbay.reference.models.config import Config
from sickbay.reference.watched import watched
from sickbay.registry import check_name, conditions
from sickbay.report.write import write_report

# Both chapters; faults that stop the loss, that spoil it slowly, and that no number of the loss betrays.
TOUR = (
    "shape-mismatch",
    "softmax-overflow",
    "log-of-zero",
    "causal-leak",
    "label-misalignment",
    "missing-gradient",
    "gradients-not-zeroed",
    "accumulation-weighting",
    "update-not-applied",
    "padding-in-loss",
    "learning-rate-too-high",
    "exploding-gradients",
)
HEALTHY_STEPS = 300
Progress = Callable[[int, int, float], None]


@dataclass(frozen=True)
class Watched:
    """One watched run. `failure`: the exception that ended it, if one did."""

    folder: Path
    checkup: Checkup
    chart: Chart
    seconds: float
    failure: BaseException | None

    @property
    def page(self) -> Path:
        return self.folder / "report.html"


@dataclass(frozen=True)
class Exhibit:
    """A planted fault: the run that has it, and the same run without it."""

    condition: Condition
    sick: Watched
    cured: Watched

    @property
    def planted(self) -> str:
        """What was planted, in a sentence."""
        return " ".join((getattr(self.condition.inject, "__doc__", None) or "").split())

    @property
    def found(self) -> bool:
        """True where the fault itself is named first."""
        return self.diagnosis is not None and self.diagnosis.condition == self.condition.id

    @property
    def diagnosis(self) -> Diagnosis | None:
        """What was named first; None where nothing was."""
        return self.sick.checkup.diagnoses[0] if self.sick.checkup.diagnoses else None

    @property
    def is_cured(self) -> bool:
        return self.cured.checkup.verdict == "healthy" and self.cured.failure is None


def healthy_case() -> Case:
    """A small healthy transformer on the shipped text."""
    return Case(config=Config(dim=64, num_layers=3, num_heads=4, context=64), steps=HEALTHY_STEPS, batch_size=12, warmup=20, eval_every=100)


def chosen(id_: str) -> Condition:
    """The condition to plant. Raises UsageError with the nearest ids for an unknown one, or for one whose fault cannot be planted."""
    check_name(id_)
    condition = conditions().get(id_)
    if condition is None:
        raise UsageError(f"{id_!r} is a chapter: `sickbay list` shows its conditions, name one of them")
    if condition.inject is None:
        raise UsageError(f"{id_} cannot be planted in the reference; `sickbay explain {id_}` tells about it")
    return condition


def train_healthy(folder: Path, progress: Progress) -> Watched:
    """The healthy run; `progress(step, steps, loss)` is called once in every step, `loss` in nats."""
    base = healthy_case()
    done = itertools.count(1)

    def backward(case: Case, loss: Tensor) -> None:
        base.backward(case, loss)
        progress(next(done), base.steps, loss.item())

    return _watch("the reference, healthy", base.but(backward=backward), folder)


def exhibit(condition: Condition, folder: Path) -> Exhibit:
    """`condition`'s fault planted in a tiny run, watched, taken out again, watched again; each run's folder lies in `folder`."""
    healthy = Case()
    sick = planted(condition, healthy)
    return Exhibit(
        condition,
        _watch(f"the reference with {condition.id}", sick, folder / condition.id),
        _watch(f"the reference without {condition.id}", without_fault(sick, healthy), folder / f"{condition.id}-cured"),
    )


def planted(condition: Condition, healthy: Case) -> Case:
    """`healthy` with the fault of `condition`, one that `chosen` has accepted."""
    assert condition.inject is not None
    sick: Case = condition.inject(healthy)
    return sick


def without_fault(sick: Case, healthy: Case) -> Case:
    """The sick case's model, length and batch size, with everything else as in `healthy`: the seams and the recipe."""
    return healthy.but(config=sick.config, steps=sick.steps, batch_size=sick.batch_size, accumulation=sick.accumulation, seed=sick.seed)


def _watch(name: str, case: Case, folder: Path) -> Watched:
    """The case has run, watched; its report calls it `name`."""
    started = time.monotonic()
    checkup, failure = watched(case, folder)
    seconds = time.monotonic() - started
    chart = load_chart(folder)
    chart.facts["script"] = name
    write_report(folder, chart, checkup)
    return Watched(folder, checkup, chart, seconds, failure)
