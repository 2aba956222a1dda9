"""Which positions are padding and which document a position belongs to, from what the forward was given and did."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from sickbay.exams.sequences import Lookup, Observation, distinct, is_position_like

_RUN = 3  # of an id that stands inside rows as well: two in a row at an end are chance among few ids
_BOUNDED_ROWS = 8  # that agree in where they end: of fewer, sorted digits may do so by chance
_LOOKED_AT = 4  # rows that an examination runs again
_SEGMENT_NAMES = ("token_type",)


@dataclass
class Padding:
    """`mask`: bool `(B, T)`, True at padding. `pad_id`: the id that fills; `known_by`: how it was told; `explicit`: a mask said so."""

    mask: Tensor
    pad_id: int
    known_by: str
    explicit: bool = False


@dataclass
class Documents:
    """`numbers`: int64 `(B, T)`, the document of each position, 0 first; -1 at padding."""

    numbers: Tensor
    known_by: str


def oriented(tensor: Tensor, shape: tuple[int, ...], axis: int) -> Tensor | None:
    """`tensor` as `(B, T)` if it has the ids' shape `(A0, A1)` or that transposed; None otherwise. `axis`: the ids' time axis."""
    rows, times = (shape[0], shape[1]) if axis == 1 else (shape[1], shape[0])
    if tuple(tensor.shape) == (rows, times):
        return tensor
    return tensor.t() if tuple(tensor.shape) == (times, rows) else None


def end_runs(hit: Tensor) -> tuple[Tensor, Tensor]:
    """`hit` bool `(B, T)` -> (the True run ending each row, the True run beginning it), each `(B, T)`; a row all True is neither."""
    trailing = hit.flip(1).long().cumprod(1).flip(1).bool()
    leading = hit.long().cumprod(1).bool()
    whole = hit.all(1, keepdim=True)
    return trailing & ~whole, leading & ~whole


def find_padding(
    ids: Tensor,
    axis: int,
    group: list[Lookup],
    seen: Observation,
    arguments: list[tuple[str, Tensor]],
    module: nn.Module | None,
    ignored: int | None,
) -> Padding | None:
    """The padding of `ids` `(B, T)`: told by a mask argument, else by a declared or compared id at row ends; None if there is none."""
    shape = group[0].ids.shape
    for _, argument in arguments:
        grid = oriented(argument, tuple(shape), axis) if argument.dim() == 2 else None
        padding = _by_mask(grid, ids) if grid is not None else None
        if padding is not None:
            return padding
    for pad_id, known_by in _declared(ids, axis, group, seen, module, ignored):
        trailing, leading = end_runs(ids == pad_id)
        alone = _only_at_ends(ids == pad_id, trailing | leading)
        sides = [side for side in (trailing, leading) if _varied(side) and (alone or not _by_chance(side))]
        if sides:
            mask = sides[0] if len(sides) == 1 or sides[0].sum() >= sides[1].sum() else sides[1]
            return Padding(mask, pad_id, known_by)
    return _by_statistics(ids)


def _only_at_ends(hit: Tensor, ends: Tensor) -> bool:
    """True where every one of at least two hits stands in a run at a row's end, rows that are all hits aside: others are tokens."""
    inside = hit & ~ends & ~hit.all(1, keepdim=True)
    return not bool(inside.any()) and int(ends.sum()) > 1


def _by_chance(side: Tensor) -> bool:
    """True for runs so short that an id which is also a token inside the rows may have made them, beside a start token of every row."""
    lengths = side.sum(1)
    return int(lengths.max() - lengths.min()) < _RUN


def _varied(side: Tensor) -> bool:
    """A start or end token stands alone in every row; padding fills rows to different lengths, or takes more than one place."""
    lengths = side.sum(1)
    return bool((lengths > 0).any()) and not bool((lengths == 1).all())


def _by_mask(grid: Tensor, ids: Tensor) -> Padding | None:
    values = grid
    if grid.is_floating_point():
        if not bool(((grid == 0) | (grid == 1) | torch.isneginf(grid)).all()):
            return None
        values = torch.isneginf(grid) if bool(torch.isneginf(grid).any()) else grid != 0
    elif grid.dtype != torch.bool:
        if not bool(((grid == 0) | (grid == 1)).all()) or torch.equal(grid.long(), ids):
            return None
        values = grid != 0
    for side in (values, ~values):
        trailing, leading = end_runs(side)
        for run in (trailing, leading):
            if bool(run.any()) and torch.equal(run | side.all(1, keepdim=True), side):
                held = ids[run]
                if bool((held == held[0]).all()) and not _constant(ids[~run]):
                    return Padding(run, int(held[0]), "a mask given to the model", explicit=True)
    return None


def _constant(values: Tensor) -> bool:
    return values.numel() == 0 or bool((values == values[0]).all())


def _declared(
    ids: Tensor, axis: int, group: list[Lookup], seen: Observation, module: nn.Module | None, ignored: int | None
) -> list[tuple[int, str]]:
    found: list[tuple[int, str]] = []
    for lookup in group:
        if lookup.padding_idx >= 0:
            found.append((lookup.padding_idx, "padding_idx of the embedding"))
    config_pad = config_value(module, "pad_token_id")
    if config_pad is not None:
        found.append((config_pad, "the model's configuration"))
    for tensor, constant in seen.compared:
        grid = oriented(tensor, tuple(group[0].ids.shape), axis) if tensor.dim() == 2 else None
        if grid is not None and torch.equal(grid.long(), ids):
            found.append((constant, "a comparison in the forward"))
    if ignored is not None and ignored >= 0:
        found.append((ignored, "the loss's ignore_index"))
    return found


def _by_statistics(ids: Tensor) -> Padding | None:
    """An id that fills row ends to different lengths and stands nowhere else.

    Half of the rows must have a run of at least three, or every row's text must begin or end with one and the same id.
    """
    if ids.shape[0] < 4 or ids.shape[1] < 6:
        return None
    for column, pick in ((-1, 0), (0, 1)):
        pad_id = int(ids[:, column].mode().values)
        hit = ids == pad_id
        run = end_runs(hit)[pick]
        lengths = run.sum(1)
        often = int((lengths >= 3).sum()) * 2 >= ids.shape[0] or _bounded(ids if column else ids.flip(1), lengths)
        if torch.equal(run, hit) and often and len(distinct(lengths)) >= 3:
            return Padding(run, pad_id, "the same id filling row ends")
    return None


def _bounded(ids: Tensor, lengths: Tensor) -> bool:
    """True where the last id before the run of `lengths` `(B,)` ending each row of `ids` is the same in all rows, and nowhere else."""
    last = ids.gather(1, (ids.shape[1] - 1 - lengths)[:, None])
    return len(ids) >= _BOUNDED_ROWS and bool((last == last[0]).all()) and int((ids == last[0]).sum()) == len(ids)


def config_value(module: nn.Module | None, name: str) -> int | None:
    """An integer of the configuration that the model or a part of it carries; None if there is none."""
    if module is None:
        return None
    for part in module.modules():
        value: Any = getattr(getattr(part, "config", None), name, None)
        if isinstance(value, (list, tuple)) and len(value) == 1:
            value = value[0]
        if isinstance(value, int) and not isinstance(value, bool) and value >= 0:
            return value
    return None


def declared_ids(module: nn.Module) -> frozenset[int]:
    """The ids that the model's embeddings or its configuration call padding."""
    found = {int(part.padding_idx) for part in module.modules() if isinstance(part, nn.Embedding) and part.padding_idx is not None}
    told = config_value(module, "pad_token_id")
    return frozenset(found if told is None else {*found, told})


def may_hold_padding(tensors: list[Tensor], pad_ids: frozenset[int]) -> bool:
    """True if an edge of a grid of ids on the CPU has one of `pad_ids` more than once, also in its first rows. Microseconds."""
    for tensor in tensors:
        whole = not tensor.is_floating_point() and tensor.dtype != torch.bool and tensor.device.type == "cpu"
        if whole and tensor.dim() == 2 and tensor.numel() and 1 not in tensor.shape:
            edges = (tensor[0], tensor[-1], tensor[:, 0], tensor[:, -1])
            hits = [edge == pad for edge in edges for pad in pad_ids]
            if any(bool(hit[:_LOOKED_AT].any()) and int(hit.sum()) > 1 for hit in hits):
                return True
    return False


def find_documents(
    ids: Tensor, axis: int, group: list[Lookup], seen: Observation, arguments: list[tuple[str, Tensor]], padding: Tensor, causal: bool
) -> Documents | None:
    """The packed documents of `ids` `(B, T)`, if the script meant them: positions that restart, document numbers, or cumulative lengths."""
    shape = tuple(group[0].ids.shape)
    looked_up = [lookup.ids for lookup in seen.lookups]
    positions = [(tensor, "positions that restart") for tensor in looked_up if tensor.shape == group[0].ids.shape or tensor.shape[0] == 1]
    positions += [(tensor, "positions that restart") for _, tensor in arguments if _whole(tensor) and tensor.dim() == 2]
    for tensor, known_by in positions:
        grid = _spread(tensor, shape, axis)
        if grid is None or torch.equal(grid, ids) or not is_position_like(grid):
            continue
        restart = torch.zeros_like(padding)
        restart[:, 1:] = (grid[:, 1:] < grid[:, :-1]) & ~padding[:, 1:] & ~padding[:, :-1]
        numbers = restart.long().cumsum(1).masked_fill(padding, -1)
        if bool((numbers > 0).any()):
            return Documents(numbers, known_by)
    for name, tensor in arguments:
        if any(mark in name for mark in _SEGMENT_NAMES) or not _whole(tensor) or _is_target(tensor, seen):
            continue
        if ids.shape[0] == 1 and _cumulative(tensor, ids.numel()):
            numbers = torch.bucketize(torch.arange(ids.shape[1]), tensor[1:].long(), right=True)[None]
            return Documents(numbers.masked_fill(padding, -1), "cumulative sequence lengths")
        if tensor.dim() != 2 or not causal or any(known.shape == tensor.shape and torch.equal(known, tensor.long()) for known in looked_up):
            continue
        grid = _spread(tensor, shape, axis)
        if grid is not None and _numbered(grid, padding):
            first = grid.masked_fill(padding, grid.max() + 1).amin(1, keepdim=True)
            return Documents((grid - first).masked_fill(padding, -1), "document numbers given to the model")
    return None


def _is_target(tensor: Tensor, seen: Observation) -> bool:
    """True for what a loss inside the forward is asked for: sorted labels look like document numbers."""
    return any(
        loss.targets.numel() == tensor.numel() and torch.equal(loss.targets.flatten(), tensor.flatten().long()) for loss in seen.losses
    )


def _cumulative(tensor: Tensor, total: int) -> bool:
    """True for the starts of at least two sequences and their end, as variable-length attention takes them."""
    rising = tensor.dim() == 1 and tensor.numel() >= 3 and bool((tensor[1:] > tensor[:-1]).all())
    return rising and int(tensor[0]) == 0 and int(tensor[-1]) == total


def _whole(tensor: Tensor) -> bool:
    return tensor.dtype in (torch.int64, torch.int32, torch.int16, torch.uint8)


def _spread(tensor: Tensor, shape: tuple[int, ...], axis: int) -> Tensor | None:
    grid = oriented(tensor, shape, axis)
    if grid is None and tensor.shape[0] == 1 and tensor.shape[1] == shape[axis]:
        grid = tensor.expand(shape[1 - axis], -1)
    return None if grid is None else grid.long()


def _numbered(grid: Tensor, padding: Tensor) -> bool:
    """Non-decreasing along each row's real positions, at least two documents somewhere, each of two positions or more on average."""
    both = ~padding[:, 1:] & ~padding[:, :-1]
    steps = (grid[:, 1:] - grid[:, :-1])[both]
    if bool((steps < 0).any()) or not bool((steps > 0).any()):
        return False
    return max(len(distinct(row[~pad])) for row, pad in zip(grid, padding)) * 2 <= grid.shape[1]
