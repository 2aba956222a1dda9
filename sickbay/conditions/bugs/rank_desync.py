"""The ranks of a data-parallel run hold different weights: each trains a model of its own, and only one of them is kept.

Looks like
    Each rank's loss falls, more slowly than it should; checksums of the weights differ between ranks; the saved model is worse than the
    training loss says. Gradients may well be averaged and equal: they are then the average over different models.

Why
    Weights initialised with a seed per rank and never broadcast, a checkpoint loaded by one rank only, gradients of some or all
    parameters not averaged, or the forward called on `model.module` instead of the DistributedDataParallel wrapper, which then never
    synchronises.

Tell apart
    Sharded weights, tensor and expert parallelism differ by design, and so do local steps between two averagings of the weights; where
    nothing shows that the ranks are to be replicas this is not examined. rank-duplicate-data is about what the ranks are fed.

Cure
    Wrap the model in DistributedDataParallel after loading it and call the wrapper; or broadcast every parameter and buffer from rank 0
    once, and all_reduce every gradient before each step.

Sources
    Li et al. 2020, arXiv 2006.15704, section 3.2 (replicas start alike and see the same gradients); PyTorch documentation,
    `DistributedDataParallel`; minimind pull request 854 and pytorch issue 104336 (the wrapper is bypassed).
"""

from __future__ import annotations

import itertools

from sickbay.core.chart import Chart, Reading
from sickbay.core.condition import Condition
from sickbay.core.diagnosis import Diagnosis, Evidence, NotExamined, Threshold

APART = Threshold(1e-6, "relative difference", source="eight float32 roundings; replicas that apply one gradient are equal to the last bit")
MARKS = Threshold(2, "steps", source="a first step may come before the script's own broadcast; two in a row are used for training")


def diagnose(chart: Chart) -> Diagnosis | NotExamined | None:
    """The first step from which a tensor that ought to be equal on all ranks differs for good."""
    steps: dict[int, dict[int, Reading]] = {}
    for mark in chart["rank_weights"]:
        steps.setdefault(mark.step, {})[int(mark.note.get("rank", 0))] = mark
    pairs = [ranks for _, ranks in sorted(steps.items()) if len(ranks) > 1]
    if len(pairs) < MARKS:
        return NotExamined(f"{len(pairs)} steps were marked on more than one rank; this needs {MARKS:.0f}")
    if any(len({mark.note.get("layout") for mark in ranks.values()}) > 1 for ranks in pairs):
        return NotExamined("the ranks hold tensors of different names or shapes, as when one model is split over them")
    if not (by := _replicated_by(pairs)):
        return NotExamined("nothing shows that the ranks are to hold the same weights")
    spreads = [_spread(ranks, pairs[0]) for ranks in pairs]
    apart = [spread > APART for spread, _ in spreads]
    again = any(earlier and not later for earlier, later in itertools.pairwise(apart))
    if again or sum(apart) < MARKS or any(mark.note.get("averaged") for mark in pairs[-1].values()):
        return None
    return _found(pairs[apart.index(True)], by, *spreads[apart.index(True)], worst=max(spreads)[0], names=_names(pairs))


def _replicated_by(pairs: list[dict[int, Reading]]) -> str:
    """What the script does to make the ranks replicas; equal gradients of unequal weights are a sign of it too."""
    seen = next((str(mark.note["by"]) for ranks in pairs for mark in ranks.values() if mark.note.get("by")), "")
    gradients = [[float(mark.note.get("gradients") or 0.0) for mark in ranks.values()] for ranks in pairs]
    equal = [g[0] > 0 and max(g) - min(g) <= APART * g[0] for g in gradients]
    return seen or ("gradients made equal before each step" if all(equal) else "")


def _spread(ranks: dict[int, Reading], first: dict[int, Reading]) -> tuple[float, int]:
    """The largest relative difference of one tensor's sum between ranks, and the tensor's place in the list.

    A tensor whose gradient the script leaves out of its averaging counts only if the ranks began with it equal.
    """
    columns = list(zip(*(mark.note["norms"] for mark in ranks.values()), strict=False))
    begun = list(zip(*(mark.note["norms"] for mark in first.values()), strict=False))
    left_out = set(next(iter(ranks.values())).note.get("apart") or ())
    differences = [
        ((max(values) - min(values)) / max(max(values), 1e-30), place)
        for place, values in enumerate(columns)
        if place not in left_out or max(begun[place]) == min(begun[place])
    ]
    return max(differences, default=(0.0, 0))


def _names(pairs: list[dict[int, Reading]]) -> list[str]:
    return next((list(mark.note["names"]) for ranks in pairs for mark in ranks.values() if mark.note.get("names")), [])


def _found(ranks: dict[int, Reading], by: str, spread: float, place: int, worst: float, names: list[str]) -> Diagnosis:
    mark = next(iter(ranks.values()))
    where = names[place] if place < len(names) else mark.where
    around = str(mark.note.get("around") or "")
    bypassed = f"; the forward goes around the {around}, which synchronises nothing then" if around else ""
    since = "from the first step" if mark.step == 0 else f"from step {mark.step} on"
    text = f"The {len(ranks)} ranks train different weights {since}: {where} differs by {spread:.2g} of its size, at most {worst:.2g} later"
    shown = tuple(Evidence(r, label=f"rank {rank}") for rank, r in sorted(ranks.items())[:2])
    largest = Evidence(Reading(mark.step, "rank_weights", spread, where), APART, label="relative difference")
    summary = f"{text} (replicas by {by}){bypassed}."
    return Diagnosis(summary, (largest, *shown), "critical", mark.step, where, mark.source, seconds=mark.seconds)


condition = Condition(
    id="rank-desync",
    symptom="the ranks of one data-parallel run hold different weights",
    needs=("rank_weights",),
    diagnose=diagnose,
    prescribes=("synchronise-ranks",),
)
