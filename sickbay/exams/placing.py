"""Finds out which position of the model's output each row of a loss came from, where sizes alone do not tell: by the values themselves."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor

from sickbay.exams.targets import Targets

ROUNDING = 1e-5  # of the spread of the rows' fingerprints: the same numbers by another kernel
_SLICE = 512  # rows
FOUND = 0.95  # share of the loss's rows that must be found again


def placed(targets: Targets, shape: tuple[int, ...], answers: Iterable[Tensor]) -> Targets | None:
    """`targets` laid out over the ids' `(A0, A1)`, by finding the rows of `targets.logits` among `answers`; None if they are not there.

    `answers`: tensors of which those of shape `(A0, A1, V)`, `(A1, A0, V)` or `(A0*A1, V)` are tried.
    """
    logits = targets.logits
    if logits is None or logits.device.type == "meta" or logits.dim() < 2:
        return None
    rows = logits.detach().reshape(-1, logits.shape[-1])
    if len(rows) != targets.values.numel() or len(rows) == 0:
        return None
    for answer in answers:
        flat = _flat(answer.detach(), shape, rows.shape[1])
        index = _found(rows, flat.log_softmax(-1) if targets.normalised else flat) if flat is not None else None
        if index is not None:
            values = torch.full((shape[0] * shape[1],), -1, dtype=torch.int64)
            counted = torch.zeros(shape[0] * shape[1], dtype=torch.bool)
            values[index], counted[index] = targets.values.flatten().long(), targets.counted.flatten()
            grid = values.reshape(shape[0], shape[1]), counted.reshape(shape[0], shape[1])
            return Targets(*grid, targets.ignored, targets.certain, targets.source, logits, targets.normalised, index, targets.values)
    return None


def _flat(answer: Tensor, shape: tuple[int, ...], classes: int) -> Tensor | None:
    if answer.shape[-1] != classes:
        return None
    if answer.dim() == 3 and tuple(answer.shape[:2]) == shape[::-1] != shape:
        answer = answer.transpose(0, 1)
    fits = tuple(answer.shape[:2]) == shape if answer.dim() == 3 else answer.dim() == 2 and answer.shape[0] == shape[0] * shape[1]
    return answer.reshape(-1, classes) if fits else None


def _found(rows: Tensor, among: Tensor) -> Tensor | None:
    """The index into `among` `(M, V)` of each of `rows` `(N, V)`; None unless nearly all are there, each at a place of its own."""
    direction = torch.linspace(1.0, 7.0, rows.shape[1], dtype=torch.float64).cos()
    wanted, known = torch.nan_to_num(rows.double()) @ direction, torch.nan_to_num(among.double()) @ direction
    ordered, order = known.sort()
    above = (
        torch.searchsorted(ordered, wanted).clamp(1, max(1, len(ordered) - 1))
        if len(ordered) > 1
        else torch.zeros_like(wanted, dtype=torch.int64)
    )
    nearer = (wanted - ordered[above - 1]).abs() <= (wanted - ordered[above]).abs()
    place = torch.where(nearer & (above > 0), above - 1, above)
    spread = float(ordered[-1] - ordered[0])
    near = (wanted - ordered[place]).abs() <= ROUNDING * max(spread, 1e-30)
    index = order[place]
    distinct = len(set(index.tolist()))
    return index if float(near.float().mean()) >= FOUND and distinct >= FOUND * len(rows) else None


def _fingerprints(rows: Tensor, direction: Tensor) -> Tensor:
    """`rows` `(N, V)` -> `(N,)` float64, a slice at a time: a double copy of a large vocabulary's logits would not fit."""
    return torch.cat([torch.nan_to_num(part.double()) @ direction for part in rows.split(_SLICE)])
