"""Gradients shrink on the way to the early layers, or behind a closed gate, until nothing there can learn.

Looks like
    The loss stays where it began or stops where the last layers alone can bring it. Early weights hardly change. Adam hides it for a
    while, since it divides by the gradient's size, but not below its epsilon of 1e-8.

Why
    A gradient is a product over the layers it passes. A sigmoid's slope is 0.25 at most, a saturated tanh's or gate's is nearly 0; ten
    layers at 0.3 leave 6e-6. Without residual connections, or with norms on the residual path itself, nothing goes around them.

Tell apart
    missing-gradient: there is no gradient at all, the graph is cut. dead-relu: units that give zero for every input. Parts that start at
    zero on purpose (LoRA's B, ReZero, zero-initialised outputs) have none in the first step only; rarely used rows and experts do not
    count, and neither does a loss already near zero, where all gradients are small together.

Cure
    Residual connections with the norm inside the branch (pre-norm), ReLU or GELU in place of sigmoid and tanh, an initialisation that
    keeps the size of activations, gates that start open or half open.

Sources
    Hochreiter 1991; Glorot & Bengio 2010, "Understanding the difficulty of training deep feedforward neural networks"; Xiong et al. 2020
    for post-norm. Limits are ratios within one step: healthy transformers' early matrices get 0.1 to 30 times the late ones' share.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from sickbay.core.chart import Chart, Reading
from sickbay.core.condition import Condition
from sickbay.core.diagnosis import Diagnosis, Evidence, NotExamined, Threshold, number
from sickbay.core.robust import median

FADED = Threshold(1e-4, "x late layers'", source="calibration on healthy networks of 2 to 24 layers, pre- and post-norm: never below 1e-2")
CLOSED = Threshold(
    1e-9, "x second largest", source="a tenth of Adam's epsilon beside gradients of size 1: Kingma & Ba 2015; LayerScale starts at 1e-6"
)
ORDERED = Threshold(0.7, "rank correlation", source="a fade along depth is nearly monotone; one odd layer is not a fade")
LASTING = Threshold(0.5, "share of steps", source="parts that start at zero have a gradient from the second step on")
FEWEST, FEWEST_STEPS = 4, 5
EARLY = 3  # matrices: a query, a key and a value


def diagnose(chart: Chart) -> Diagnosis | NotExamined | None:
    profile = _profile(chart)
    steps = _by_step(chart, profile)
    if len(profile) < FEWEST or not steps:
        return NotExamined(f"fewer than {FEWEST} weight matrices with a gradient were seen in one step")
    found = _faded(profile, steps) or _closed(profile, steps)
    if found is None:
        return None
    first, ratio, limit = found
    beside = f"the last layers, relative to its size: it fades over {len(profile)} matrices." if limit is FADED else "the other matrices."
    value = median([row[first.where] for row in steps if first.where in row])
    return Diagnosis(
        summary=f"{first.where} gets {number(ratio)} x the gradient of {beside}",
        evidence=(Evidence(Reading(first.step, first.signal, value, first.where), limit * value / ratio if ratio > 0 else None),),
        severity="warning",
        step=first.step,
        where=first.where,
        source=first.source,
    )


def _profile(chart: Chart) -> list[Reading]:
    """The matrices in order of first use, from the step that shows most of them."""
    steps: dict[int, list[Reading]] = {}
    for reading in chart["gradient_by_depth"].finite():
        steps.setdefault(reading.step, []).append(reading)
    fullest = max(steps.values(), key=len, default=[])
    return sorted(fullest, key=lambda r: float(r.note.get("depth") or 0))


def _by_step(chart: Chart, profile: list[Reading]) -> list[dict[str, float]]:
    """Per step each matrix' gradient over its weight: from every optimizer step where they were read, else from the looks."""
    sizes = {r.where: float(r.note["size"]) for r in profile}
    steps: dict[int, dict[str, float]] = {}
    for reading in chart["param_grad_norm"].finite():
        if reading.where in sizes:
            steps.setdefault(reading.step, {})[reading.where] = reading.value / sizes[reading.where]
    if not any(len(row) >= FEWEST for row in steps.values()):
        for reading in chart["gradient_by_depth"].finite():
            steps.setdefault(reading.step, {})[reading.where] = reading.value
    return [row for row in steps.values() if any(row.values())]


Found = tuple[Reading, float, Threshold]


def _faded(profile: list[Reading], steps: list[dict[str, float]]) -> Found | None:
    """The earliest matrix and its share, where gradients fall along depth beyond FADED in most steps.

    All early matrices fade, then: queries and keys alone have next to no gradient while attention is still uniform.
    """
    quarter = max(1, len(profile) // 4)
    first, late = [r.where for r in profile[: max(EARLY, quarter)]], [r.where for r in profile[-quarter:]]
    ratios = [max(row.get(name, 0.0) for name in first) / _middle(row, late) for row in steps if _middle(row, late) > 0]
    if sum(ratio < FADED for ratio in ratios) <= LASTING * len(ratios):
        return None
    typical = {r.where: median([row[r.where] for row in steps if r.where in row] or [0.0]) for r in profile}
    if _rank_correlation([typical[r.where] for r in profile]) < ORDERED:
        return None
    return min(profile[:quarter], key=lambda r: typical[r.where]), median(ratios), FADED


def _closed(profile: list[Reading], steps: list[dict[str, float]]) -> Found | None:
    """The matrix that got some gradient but in no step more than CLOSED of the second largest, and the most it got.

    Not of the median's: where every gate is closed most matrices lie behind one.
    """
    most: dict[str, float] = {}
    for row in steps:
        open_ = sorted(row.values())[-2:][0]
        for name, value in row.items():
            most[name] = max(most.get(name, 0.0), value / open_ if open_ > 0 else 1.0)
    closed = [r for r in profile if 0 < most.get(r.where, 1.0) < CLOSED]
    if len(steps) < FEWEST_STEPS or not closed:
        return None
    first = min(closed, key=lambda r: most[r.where])
    return first, most[first.where], CLOSED


def _middle(row: dict[str, float], names: Iterable[str]) -> float:
    values = [row[name] for name in names if name in row]
    return median(values) if values else 0.0


def _rank_correlation(values: list[float]) -> float:
    """Spearman's, of `values` with their position."""
    count = len(values)
    ranks = {index: rank for rank, index in enumerate(sorted(range(count), key=lambda i: values[i]))}
    return 1 - 6 * sum((index - rank) ** 2 for index, rank in ranks.items()) / (count * (count * count - 1))


def inject(case: Any) -> Any:
    """Twenty layers of a linear map and a sigmoid between the embedding and the blocks, with nothing around them."""

    def build(sick: Any) -> Any:
        from torch import nn

        model = case.build(sick)
        layers = [part for _ in range(20) for part in (nn.Linear(sick.config.dim, sick.config.dim), nn.Sigmoid())]
        model.dropout = nn.Sequential(*layers)
        return model

    return case.but(build=build)


condition = Condition(
    id="vanishing-gradients",
    symptom="gradients shrink to nothing towards the early layers or behind a gate",
    needs=("gradient_by_depth",),
    uses=("param_grad_norm",),
    diagnose=diagnose,
    prescribes=("shorten-gradient-path",),
    leads_to=("loss-plateau", "learning-rate-too-low", "model-too-small", "repetitive-generation", "incoherent-generation"),
    inject=inject,
)
