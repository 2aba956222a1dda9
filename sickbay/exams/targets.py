"""Targets against inputs: which offset the loss asks for, what it ignores, whether it counts padding, whether it ever asks for the end."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from sickbay.exams.padding import Padding
from sickbay.patient import LossCall

OFFSETS = (-1, 0, 1, 2, 3)
MATCH = 0.95  # share of counted targets; exact by construction, 5 % left for edited tokens
RIVAL = 0.8  # another offset that agrees this often makes the data too repetitive to tell
FEWEST = 8  # counted targets below which nothing is said
_MAX_NODES = 3000
_MATMULS = (
    "MmBackward",
    "AddmmBackward",
    "BmmBackward",
    "BaddbmmBackward",
    "LinearBackward",
    "EmbeddingBackward",
    "CompiledFunction",
    "ConvolutionBackward",
)


@dataclass
class Targets:
    """What one loss was given. `values`: int64 of any shape; `counted`: bool of that shape; `certain`: False where `counted` is a guess.

    `logits`: `(N, V)`, or their log-probabilities where `normalised`; None if unknown. Where the targets had to be placed by value,
    `index` `(N,)` is each one's place in the flattened ids and `raw` what the loss was given. `scored`: look-ups of
    ids whose score is to rise, 0 for other targets.
    """

    values: Tensor
    counted: Tensor
    ignored: int | None
    certain: bool
    source: str = ""
    logits: Tensor | None = None
    normalised: bool = False
    index: Tensor | None = None
    raw: Tensor | None = None
    scored: int = 0


@dataclass
class Alignment:
    """How targets lie over ids `(A0, A1)`: `values`, `counted` brought to `(B, T)`, `offset` -1 for none; `time_axis` is that of the ids.

    `match`: share of agreeing counted targets by offset. `clear`: False when several offsets agree.
    """

    values: Tensor
    counted: Tensor
    time_axis: int
    offset: int
    match: dict[int, float]
    clear: bool = True
    flipped: bool = False
    compared: int = 0
    note: dict[str, Any] = field(default_factory=dict)


def from_graph(loss: Tensor) -> list[Targets]:
    """The targets of every loss between `loss` and the last matrix product, from the autograd graph; counted = has influence on `loss`."""
    found: list[Targets] = []
    visited: set[Any] = set()
    stack: list[Any] = [loss.grad_fn]
    while stack and len(visited) < _MAX_NODES:
        node: Any = stack.pop(0)
        if node is None or node in visited:
            continue
        visited.add(node)
        name = node.name()
        if any(name.startswith(mark) for mark in _MATMULS):
            continue
        picked = _targets_of(node, name)
        if picked is not None:
            values, ignored = picked
            weight = _influence(loss, node)
            certain = weight is not None
            counted = torch.ones_like(values, dtype=torch.bool)
            if weight is not None and weight.numel() == values.numel():
                counted = (weight != 0).reshape(values.shape)
            if ignored is not None:
                counted = counted & (values != ignored)
            logits = node._saved_self if name.startswith(("NllLossBackward", "GatherBackward")) else None
            found.append(Targets(values, counted, ignored, certain, logits=logits, normalised=True))
        stack.extend(edge for edge, _ in node.next_functions)
    return found


def _targets_of(node: Any, name: str) -> tuple[Tensor, int | None] | None:
    if name.startswith("NllLoss"):
        ignored = int(node._saved_ignore_index)
        return node._saved_target, ignored - 2**64 if ignored >= 2**63 else ignored  # saved as unsigned
    if name.startswith("GatherBackward") and node._saved_index.shape[-1:] == (1,) and node._saved_index.dim() in (2, 3):
        return node._saved_index.squeeze(-1), None
    if name.startswith("IndexBackward"):
        indices = [index for index in node._saved_indices if index is not None]
        if len(indices) >= 2 and all(i.dtype == torch.int64 for i in indices):
            return indices[-1], None
    return None


def _influence(loss: Tensor, node: Any) -> Tensor | None:
    """The gradient of `loss` with respect to the node's result; None if it cannot be had."""
    edge = getattr(torch.autograd.graph, "GradientEdge", None)
    if edge is None:
        return None
    try:
        (gradient,) = torch.autograd.grad(loss, [edge(node, 0)], retain_graph=True, allow_unused=True)
    except RuntimeError:
        return None
    return gradient if isinstance(gradient, Tensor) else None


def from_call(call: LossCall) -> Targets | None:
    """The targets of a captured loss call; distributions over classes count as their likeliest class. None for regression."""
    values, logits = call.targets.detach(), call.logits
    if not values.is_floating_point():
        if values.dtype == torch.bool:
            return None
        certain = call.reduction != "none"
        return Targets(values.long(), values != call.ignore_index, call.ignore_index, certain, call.source, logits)
    if values.shape != logits.shape or values.dim() < 2 or values.shape[-1] < 3:
        return None
    mass = values.sum(-1)
    if call.name not in ("kl_div", "cross_entropy") or not bool(((mass - 1).abs() < 0.05).logical_or(mass == 0).all()):
        return None
    return Targets(values.argmax(-1), mass > 0, None, True, call.source)


def align(targets: Targets, ids: Tensor, known_time_axis: int | None = None) -> Alignment | None:
    """The best way to lay `targets` over ids `(A0, A1)`; None when their sizes do not fit."""
    best: Alignment | None = None
    for values, counted, axis, flipped in _layouts(targets, ids):
        for time in (axis,) if axis is not None else (1, 0):
            candidate = _at_axis(values, counted, ids, time, flipped)
            known = 0.5 if time == known_time_axis else 0.0
            if best is None or (_rank(candidate), known) > (_rank(best), 0.5 if best.time_axis == known_time_axis else 0.0):
                best = candidate
    return best


def _rank(candidate: Alignment) -> float:
    return max((share for share in candidate.match.values()), default=0.0) if candidate.offset >= 0 or not candidate.clear else 0.0


def _layouts(targets: Targets, ids: Tensor) -> list[tuple[Tensor, Tensor, int | None, bool]]:
    """Every (values, counted, time axis if told by the sizes, flipped) with axes in the order of the ids'."""
    shape, total = tuple(ids.shape), targets.values.numel()
    squeezed = tuple(size for size in targets.values.shape if size != 1) if targets.values.dim() > 1 else tuple(targets.values.shape)
    found: list[tuple[Tensor, Tensor, int | None, bool]] = []
    for flipped in (False, True):
        first, second = shape if not flipped else shape[::-1]
        grids: list[tuple[int, int, int | None]] = [(first, second - cut, 1 if cut else None) for cut in (0, 1, 2)]
        grids += [(first - cut, second, 0) for cut in (1, 2)]
        for rows, columns, time in grids:
            if rows < 1 or columns < 1 or rows * columns != total:
                continue
            if len(squeezed) == 2 and squeezed != (rows, columns):
                continue
            values, counted = targets.values.reshape(rows, columns), targets.counted.reshape(rows, columns)
            if flipped:
                values, counted, time = values.t(), counted.t(), None if time is None else 1 - time
            found.append((values, counted, time, flipped))
    return found


def _at_axis(values: Tensor, counted: Tensor, ids: Tensor, time: int, flipped: bool) -> Alignment:
    if time == 0:
        values, counted, ids = values.t(), counted.t(), ids.t()
    length = ids.shape[1]
    match: dict[int, float] = {}
    most = 0
    for offset in OFFSETS:
        low, high = max(0, -offset), min(values.shape[1], length - offset)
        if high <= low:
            continue
        part = counted[:, low:high]
        number = int(part.sum())
        if number < FEWEST:
            continue
        most = max(most, number)
        match[offset] = round(float((values[:, low:high] == ids[:, low + offset : high + offset])[part].float().mean()), 4)
    ahead = {offset: share for offset, share in match.items() if share >= MATCH}
    best = max(ahead, key=lambda k: ahead[k], default=None)
    # Agreement at -1 is a shift in the wrong direction; the number stays that of "none" and the match tells.
    clear = best is None or all(share < RIVAL for other, share in match.items() if other != best)
    return Alignment(values, counted, time, best if clear and best is not None else -1, match, clear, flipped, most)


def fit(grid: Tensor, shape: tuple[int, ...] | torch.Size) -> Tensor:
    """`grid` `(B, x)` cut, or filled with zeros (False), to `shape` `(B, n)`: answers and inputs begin at the same position."""
    fitted = torch.zeros(tuple(shape), dtype=grid.dtype)
    width = min(grid.shape[1], shape[1])
    fitted[:, :width] = grid[:, :width]
    return fitted


def graded(
    target: Targets, lookup_ids: Tensor, aligned: Alignment, padding: Padding, eos: int | None
) -> list[tuple[str, float, dict[str, Any]]]:
    """padding_counted and eos_targets as (signal, value, note): what the loss counts at padding, and whether it ever asks for the end."""
    found: list[tuple[str, float, dict[str, Any]]] = []
    counted = int(aligned.counted.sum())
    if counted and target.certain:
        at_padding = aligned.counted & fit(padding.mask, aligned.values.shape)
        if aligned.offset >= 1:  # the first padding after the text is a legitimate end token: its input is real
            at_padding &= aligned.values == padding.pad_id
        note = {"pad_id": padding.pad_id, "known_by": padding.known_by, "counted": counted}
        found.append(("padding_counted", int(at_padding.sum()) / counted, note))
    ids = lookup_ids if aligned.time_axis == 1 else lookup_ids.t()
    real = (ids == padding.pad_id) & ~padding.mask
    shared = eos == padding.pad_id or (padding.explicit and bool(real[:, 1:].any()))
    if aligned.offset >= 1 and shared:
        # A mask tells real end tokens from padding; without one, the first of the run that ends a row may be real.
        ends = int(real[:, 1:].sum()) + (0 if padding.explicit else int(padding.mask[:, -1].sum()))
        value = int((aligned.counted & (aligned.values == padding.pad_id)).sum())
        found.append(("eos_targets", value, {"eos_id": padding.pad_id, "eos_in_inputs": ends, "known_by": padding.known_by}))
    return found
