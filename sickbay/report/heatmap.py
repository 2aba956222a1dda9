"""The layer by step map: one signal of many tensors, merged by maximum into a grid that fits a page."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from sickbay.core.chart import Chart
from sickbay.core.diagnosis import number
from sickbay.core.signals import SIGNALS
from sickbay.report.words import one_line, shorten

MAX_ROWS = 56
MAX_COLUMNS = 120
LEVELS = 24
# One outlier must not push all other colours into one: the scale ends at these quantiles.
QUANTILES = (0.02, 0.995)

LABEL_WIDTH = 250
MAP_WIDTH = 690
ROW_HEIGHT = 14
TOP = 22
LABEL_LENGTH = 36

Floats = npt.NDArray[np.float64]


@dataclass(frozen=True)
class Grid:
    """`values`: `(rows, columns)`, the largest in each cell; NaN = not measured, infinity = a value that was not finite.

    `columns` are the (first, last) steps of each column; `rows` name modules or parameters.
    """

    signal: str
    rows: list[str]
    columns: list[tuple[int, int]]
    values: Floats
    merged: int


@dataclass(frozen=True)
class Drawing:
    """What the template needs to draw one grid as SVG: a path per colour, labels, ticks and marks, all in SVG units."""

    signal: str
    title: str
    note: str
    width: int
    height: int
    paths: list[tuple[str, str]]
    labels: list[tuple[float, str, str]]
    ticks: list[tuple[float, str]]
    marks: list[tuple[float, str, str]]
    low: str
    high: str
    lost: bool
    data: dict[str, Any]


def grid(chart: Chart, signal: str) -> Grid | None:
    """The readings of `signal` as a grid of at most MAX_ROWS by MAX_COLUMNS; None if there are none."""
    steps, places, values = largest_by_step(chart, signal)
    if not values.size:
        return None
    rows, members = _merge_places(places)
    by_row = np.stack([_largest(values[:, member], axis=1) for member in members])
    edges = np.linspace(0, len(steps), min(MAX_COLUMNS, len(steps)) + 1).astype(int)
    spans = list(itertools.pairwise(edges))
    cells = np.stack([_largest(by_row[:, start:end], axis=1) for start, end in spans], axis=1)
    columns = [(steps[start][0], steps[end - 1][1]) for start, end in spans]
    return Grid(signal, rows, columns, cells, len(places) if len(rows) < len(places) else 0)


def drawing(grid: Grid, marks: Sequence[tuple[int, str, str]]) -> Drawing:
    """`grid` as SVG geometry; `marks` are (step, label, severity) of the findings."""
    levels, low, high = _levels(grid.values)
    seen = grid.values[np.isfinite(grid.values)]
    height, count = len(grid.rows), len(grid.columns)
    cell = MAP_WIDTH / count
    shapes: dict[str, list[str]] = {}
    for row in range(height):
        column = 0
        while column < count:
            level, start = levels[row][column], column
            while column < count and levels[row][column] == level:
                column += 1
            if level:
                x, width = LABEL_WIDTH + start * cell, (column - start) * cell
                shapes.setdefault(level, []).append(f"M{x:.1f} {TOP + row * ROW_HEIGHT}h{width:.1f}v{ROW_HEIGHT - 1}h-{width:.1f}z")
    labels = [
        (TOP + row * ROW_HEIGHT + ROW_HEIGHT * 0.72, shorten(name, LABEL_LENGTH), name) for row, name in enumerate(map(one_line, grid.rows))
    ]
    every = max(1, math.ceil(count / 8))
    ticks = [(LABEL_WIDTH + (column + 0.5) * cell, f"{grid.columns[column][0]:,}") for column in range(0, count, every)]
    title = {"param_grad_norm": "Gradient norm", "update_ratio": "Update ratio"}.get(grid.signal, grid.signal)
    return Drawing(
        signal=grid.signal,
        title=title,
        note=f"{grid.merged} tensors merged into {height} rows, each showing its largest" if grid.merged else "",
        width=LABEL_WIDTH + MAP_WIDTH + 10,
        height=TOP + height * ROW_HEIGHT + 24,
        paths=[(level, "".join(parts)) for level, parts in sorted(shapes.items())],
        labels=labels,
        ticks=ticks,
        marks=[(LABEL_WIDTH + (_column(grid, step) + 0.5) * cell, label, severity) for step, label, severity in marks],
        low=("≤ " if (seen < low).any() else "") + number(low),
        high=("≥ " if (seen > high).any() else "") + number(high),
        lost="lost" in shapes,
        data={
            "signal": grid.signal,
            "unit": SIGNALS[grid.signal].unit,
            "rows": [one_line(name) for name in grid.rows],
            "columns": grid.columns,
            "values": [[_shown(value) for value in row] for row in grid.values.tolist()],
            "box": [LABEL_WIDTH, TOP, MAP_WIDTH, height * ROW_HEIGHT],
        },
    )


def largest_by_step(chart: Chart, signal: str) -> tuple[list[tuple[int, int]], list[str], Floats]:
    """The (first, last) steps, the places and the `(steps, places)` values: NaN = not measured, infinity = not finite."""
    table = chart.table(signal)
    values = np.array(table.values, dtype=np.float64)
    values[~np.isfinite(values)] = np.inf
    values[table.counts == 0] = np.nan
    return list(zip(table.firsts.tolist(), table.steps.tolist())), list(table.places), values


def _largest(values: Floats, axis: int) -> Floats:
    # fmax ignores NaN (not measured) and lets infinity (not finite) win.
    return np.asarray(np.fmax.reduce(values, axis=axis), dtype=np.float64)


def _merge_places(places: Sequence[str]) -> tuple[list[str], list[list[int]]]:
    """At most MAX_ROWS groups of places: by the longest common depth of module path that fits, else neighbours together."""
    depth = max(place.count(".") for place in places) + 1
    groups: dict[str, list[int]] = {place: [index] for index, place in enumerate(places)}
    while len(groups) > MAX_ROWS and depth > 1:
        depth -= 1
        groups = {}
        for index, place in enumerate(places):
            groups.setdefault(".".join(place.split(".")[:depth]), []).append(index)
    if len(groups) <= MAX_ROWS:
        return list(groups), list(groups.values())
    names, members = list(groups), list(groups.values())
    edges = [round(i * len(names) / MAX_ROWS) for i in range(MAX_ROWS + 1)]
    spans = list(itertools.pairwise(edges))
    rows = [names[a] if b - a == 1 else f"{names[a]} to {names[b - 1]}" for a, b in spans]
    return rows, [[index for group in members[a:b] for index in group] for a, b in spans]


def _levels(values: Floats) -> tuple[list[list[str]], float, float]:
    positive = values[np.isfinite(values) & (values > 0)]
    low, high = (float(q) for q in np.quantile(positive, QUANTILES)) if positive.size else (math.nan, math.nan)
    span = math.log(high / low) if positive.size and high > low else 0.0

    def level(value: float) -> str:
        if value != value:
            return ""
        if math.isinf(value):
            return "lost"
        if value <= 0:
            return "q0"
        share = math.log(value / low) / span if span else 0.5
        return f"q{min(LEVELS - 1, max(0, int(share * LEVELS)))}"

    return [[level(value) for value in row] for row in values.tolist()], low, high


def _column(grid: Grid, step: int) -> int:
    """The last column that begins at or before `step`."""
    return max(0, sum(first <= step for first, _ in grid.columns) - 1)


def _shown(value: float) -> float | str | None:
    if value != value:
        return None
    return "not finite" if math.isinf(value) else float(f"{value:.3g}")
