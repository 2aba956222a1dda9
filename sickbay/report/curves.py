"""The page's line charts as data: one signal over steps, thinned so that no peak and no NaN is lost."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np

from sickbay.core.chart import Chart
from sickbay.core.diagnosis import number
from sickbay.core.signals import SIGNALS
from sickbay.report.heatmap import largest_by_step

# About twice as many points as a chart on a wide screen has pixels across.
MAX_POINTS = 1600
LOG_SPAN = 50.0
CHANCE = "uniform guess"


@dataclass(frozen=True)
class Line:
    """One curve; None where it has no finite value."""

    label: str
    values: list[float | None]
    dashed: bool = False


@dataclass(frozen=True)
class Curves:
    """One chart: `steps` is shared by all `lines`; `lost` are the steps with a NaN or an infinity."""

    id: str
    title: str
    unit: str
    steps: list[int]
    lines: list[Line]
    log: bool
    lost: list[int]
    caption: str


def all_curves(chart: Chart) -> list[Curves]:
    """The charts that this run has readings for: loss, gradient norm, update ratio, learning rate."""
    wanted = [
        (
            "loss",
            "Loss",
            [("loss", _by_step(chart, "loss")), ("eval_loss", _by_step(chart, "eval_loss")), (CHANCE, _by_step(chart, "chance_loss"))],
        ),
        ("grad_norm", "Gradient norm", [("grad_norm", _by_step(chart, "grad_norm"))]),
        ("update_ratio", "Update ratio", _over_tensors(chart, "update_ratio")),
        ("learning_rate", "Learning rate", [("learning_rate", _by_step(chart, "learning_rate"))]),
    ]
    return [_curves(id_, title, [row for row in rows if row[1]]) for id_, title, rows in wanted if any(values for _, values in rows[:2])]


def _by_step(chart: Chart, signal: str) -> dict[int, float]:
    """The value at each step; of several, the largest, NaN before all."""
    values: dict[int, float] = {}
    for reading in chart[signal]:
        known = values.get(reading.step, -math.inf)
        values[reading.step] = max(known, reading.value, key=lambda value: (value != value, value))
    return values


def _over_tensors(chart: Chart, signal: str) -> list[tuple[str, dict[int, float]]]:
    spans, _, values = largest_by_step(chart, signal)
    largest: dict[int, float] = {}
    middle: dict[int, float] = {}
    for (_, step), row in zip(spans, values):
        present = row[~np.isnan(row)]
        if present.size:
            largest[step], middle[step] = float(present.max()), float(np.median(present))
    return [("largest tensor", largest), ("median tensor", middle)]


def _curves(id_: str, title: str, raw: list[tuple[str, dict[int, float]]]) -> Curves:
    steps = sorted({step for _, values in raw for step in values})
    raw = [(label, _held(values, steps) if label == CHANCE else values) for label, values in raw]
    lost = sorted({step for _, values in raw for step, value in values.items() if not math.isfinite(value)})
    solid = [value for label, values in raw if label != CHANCE for value in values.values() if math.isfinite(value)]
    positive = [value for value in solid if value > 0]
    # A rate that warms up from zero belongs on a plain axis, where zero has a place.
    log = bool(positive) and len(positive) == len(solid) and max(positive) > LOG_SPAN * min(positive)
    kept = _thin(steps, [values for _, values in raw])
    lines = [Line(label, [_finite(values.get(step)) for step in kept], label == CHANCE) for label, values in raw]
    return Curves(id_, title, SIGNALS[id_].unit, kept, lines, log, _thin_steps(lost), _caption(raw[0][1]))


def _held(values: dict[int, float], steps: list[int]) -> dict[int, float]:
    """`values` with each held until the next: what was measured once stays true."""
    held: dict[int, float] = {}
    known = values[min(values)]
    for step in steps:
        known = held[step] = values.get(step, known)
    return held


def _caption(values: dict[int, float]) -> str:
    finite = [value for value in values.values() if math.isfinite(value)]
    first, last = values[min(values)], values[max(values)]
    text = f"first {number(first)}, last {number(last)}"
    return text + (f", lowest {number(min(finite))}, highest {number(max(finite))}" if finite else ", never finite")


def _thin(steps: list[int], curves: list[dict[int, float]]) -> list[int]:
    """At most about MAX_POINTS of `steps`: of each stretch, those where a curve is lowest, highest or not finite."""
    if len(steps) <= MAX_POINTS:
        return steps
    stretch = math.ceil(len(steps) * 2 * len(curves) / MAX_POINTS)
    kept: set[int] = {steps[0], steps[-1]}
    for start in range(0, len(steps), stretch):
        here = steps[start : start + stretch]
        for curve in curves:
            present = [step for step in here if step in curve]
            finite = [step for step in present if math.isfinite(curve[step])]
            kept.update([step for step in present if not math.isfinite(curve[step])][:1])
            if finite:
                kept.update((min(finite, key=curve.__getitem__), max(finite, key=curve.__getitem__)))
    return sorted(kept)


def _thin_steps(steps: Iterable[int], at_most: int = 400) -> list[int]:
    listed = list(steps)
    return listed[:: math.ceil(len(listed) / at_most) or 1]


def _finite(value: float | None) -> float | None:
    return float(f"{value:.6g}") if value is not None and math.isfinite(value) else None
