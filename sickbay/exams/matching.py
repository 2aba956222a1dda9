"""Which token input a loss's targets belong to, and where the loss was computed."""

from __future__ import annotations

import torch

from sickbay.exams.placing import placed
from sickbay.exams.sequences import Lookup, Observation, Rerun, float_leaves, time_axis
from sickbay.exams.targets import Alignment, Targets, align

Main = tuple[Targets, list[Lookup], Alignment]


def targets_inside(seen: Observation) -> list[Targets]:
    """The targets of the losses computed inside the forward."""
    found = []
    for loss in seen.losses:
        values = loss.targets.long()
        counted = values != loss.ignored if loss.ignored is not None else torch.ones_like(values, dtype=torch.bool)
        found.append(Targets(values, counted, loss.ignored, loss.ignored is not None, loss.source))
    return found


def answers_with(again: Rerun, seen: Observation, target: Targets) -> bool:
    """True unless the loss lies outside the forward and is plainly given something else than its output."""
    if again.call is None or target.logits is None or matching_loss(seen, [target]) is not None:
        return True
    sizes = {size for leaf in float_leaves(seen.output) for size in leaf.shape[1:]}
    return target.logits.shape[-1] in sizes or target.logits.shape[1] in sizes


def best_fit(target: Targets, groups: list[list[Lookup]], seen: Observation) -> Main | None:
    """`target` with the token input that it fits best; None if it fits none."""
    fits = [
        (target, group, found)
        for group in groups
        if not _own_look_up(target, group) and (found := align(target, group[0].ids, time_axis(seen, tuple(group[0].ids.shape))))
    ]
    return max(fits, key=lambda fit_: (fit_[2].offset >= 0, fit_[2].match.get(fit_[2].offset, 0.0)), default=None)


def _own_look_up(target: Targets, group: list[Lookup]) -> bool:
    """True for the look-up by which a model that scores its targets itself has embedded them: those ids are looked up nowhere else."""
    ids = group[0].ids
    return target.scored == 1 and ids.shape == target.values.shape and torch.equal(ids, target.values)


def placed_fit(target: Targets, groups: list[list[Lookup]], seen: Observation) -> Main | None:
    """As `best_fit`; where sizes do not tell which outputs the loss took (a selection, a slice), they are found by their values.

    What is scored may have nothing to do with the input: it is taken for its targets only where it agrees with it.
    """
    best = best_fit(target, groups, seen)
    if target.scored:
        return best if best is not None and best[2].offset >= 0 else None
    if best is not None and best[2].values.numel() == best[1][0].ids.numel():
        return best
    inside = matching_loss(seen, [target])
    answers = float_leaves(seen.output) if inside is None else list(reversed(seen.losses[inside].answers))
    for group in [best[1]] if best else groups:
        laid = placed(target, tuple(group[0].ids.shape), answers)
        again = best_fit(laid, [group], seen) if laid else None
        if again is not None and (best is None or again[2].offset != best[2].offset):
            return again
    return best


def time_axis_of(group: list[Lookup], seen: Observation, targets: list[Targets]) -> int | None:
    """The time axis of ids whose targets do not tell it: from positions, else from outputs or targets with one row per sequence."""
    shape = tuple(group[0].ids.shape)
    axis = time_axis(seen, shape)
    if axis is not None or shape[0] == shape[1]:
        return axis
    sizes = {leaf.shape[0] for leaf in float_leaves(seen.output) if leaf.dim() == 2} | {t.values.numel() for t in targets}
    if shape[0] in sizes and shape[1] not in sizes:
        return 1
    return 0 if shape[1] in sizes and shape[0] not in sizes else None


def matching_loss(seen: Observation, targets: list[Targets]) -> int | None:
    """Which loss inside the forward was given one of `targets`; None if it lies outside."""
    for target in targets:
        values = (target.values if target.raw is None else target.raw).flatten().long()
        for loss in seen.losses:
            if loss.targets.numel() == values.numel() and torch.equal(loss.targets.flatten().long(), values):
                return loss.occurrence
    return None
