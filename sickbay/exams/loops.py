"""Python loops inside a forward whose calls do not need one another, and how much faster one batched call does the same."""

from __future__ import annotations

from collections import Counter, defaultdict
from typing import Any

import torch
from torch import Tensor

from sickbay.exams.op_profile import Profile, Timed, least, levels
from sickbay.patient import tensors_in

WIDTH = 16  # calls that do not need one another: more than the heads or experts that are commonly kept in lists
_LEAST_SHARE = 0.1  # of the forward's seconds: less is not worth a question
_MOST_LINES = 24
_MATRIX = ("mm", "addmm", "bmm", "baddbmm", "mv", "dot", "linear")


def examine(profile: Profile, rows: int, forward: float, most: float) -> list[dict[str, Any]]:
    """Readings of `loop_gain`, at most one: the share of the forward's seconds that batching its widest loops would save.

    `forward`: seconds of the forward unwatched; what they exceed the operations' own is the price of calling them.
    """
    groups: dict[tuple[str, str], list[Timed]] = defaultdict(list)
    for operation in profile.operations:
        if operation.line and not operation.view and not operation.name.endswith("_"):
            groups[operation.line, operation.name].append(operation)
    total = max(profile.seconds, forward)
    per_call = (total - profile.seconds) / max(1, len(profile.operations))
    wide = {key: calls for key, calls in groups.items() if len(calls) >= WIDTH}
    if not total or sum(c.seconds + per_call for calls in wide.values() for c in calls) < _LEAST_SHARE * total:
        return []
    found: list[tuple[float, float, int, list[Timed]]] = []
    level = levels(profile.operations)
    for calls in sorted(wide.values(), key=lambda calls: -sum(c.seconds for c in calls))[:_MOST_LINES]:
        width = len(calls) // len({level[id(call)] for call in calls})
        if width < WIDTH or not _one_weight(calls, width, profile.leaves):
            continue
        batched = _batched_seconds(calls, width, most / _MOST_LINES)
        if batched is not None:
            found.append((sum(call.seconds for call in calls), batched * len(calls) / width, width, calls))
    saved = sum(max(0.0, loop - batched) for loop, batched, _, _ in found)
    widths = {calls[0].line: width for _, _, width, calls in found}
    saved += sum(per_call * (1 - 1 / widths[operation.line]) for operation in profile.operations if operation.line in widths)
    if saved < _LEAST_SHARE * total:
        return []
    main = max(found, key=lambda item: (item[3][0].name in _MATRIX) * item[0] + item[0] * 1e-3)
    width, calls = main[2], main[3]
    of_parameters = any(storage in profile.leaves for _, _, _, group in found for storage in group[0].reads)
    note = {
        "count": len(calls),
        "width": width,
        "operation": calls[0].name,
        "shape": [list(tensor.shape) for _, tensor in tensors_in(calls[-1].args)][:2],
        "loop_seconds": sum(item[0] for item in found),
        "batched_seconds": sum(item[1] for item in found),
        "per_row": bool(of_parameters and rows == width),
    }
    return [{"signal": "loop_gain", "value": saved / total, "where": calls[0].module, "source": _usual_line(found), "note": note}]


def _usual_line(found: list[tuple[float, float, int, list[Timed]]]) -> str:
    seconds: Counter[str] = Counter()
    for loop, _, _, calls in found:
        seconds[calls[0].line] += loop  # type: ignore[assignment]
    return seconds.most_common(1)[0][0]


def _one_weight(calls: list[Timed], width: int, leaves: frozenset[int]) -> bool:
    """False where the calls use weights of their own, as heads and experts do."""
    weights = {storage for call in calls for storage in call.reads if storage in leaves}
    return len(weights) <= 2 * (len(calls) // width)


def _batched_seconds(calls: list[Timed], width: int, most: float) -> float | None:
    """Processor seconds of one call that does `width` of the largest ones at once; None where it cannot be done."""
    largest = max(calls, key=lambda call: sum(tensor.numel() for _, tensor in tensors_in(call.args)))
    flat, axes = [], []
    leaves = {id(tensor) for tensor in _shared(calls)}
    for value in largest.args:
        if isinstance(value, Tensor) and id(value) not in leaves and value.dim() > 0:
            flat.append(torch.stack([value] * width))
            axes.append(0)
        elif isinstance(value, (list, tuple)) and any(isinstance(item, Tensor) for item in value):
            return None
        else:
            flat.append(value)
            axes.append(None)  # type: ignore[arg-type]
    if not any(axis == 0 for axis in axes):
        return None
    batched = torch.func.vmap(lambda *args: largest.function(*args, **largest.kwargs), in_dims=tuple(axes))
    try:
        with torch.no_grad():
            return least(lambda: batched(*flat), most)
    except Exception:  # no batching rule: nothing can be said of this operation
        return None


def _shared(calls: list[Timed]) -> list[Tensor]:
    """The tensors of the largest call that every other call of its layer is given as well: weights."""
    last = calls[-1]
    before = {tensor.untyped_storage()._cdata for _, tensor in tensors_in(calls[-2].args)} if len(calls) > 1 else set()
    largest = max(calls, key=lambda call: sum(tensor.numel() for _, tensor in tensors_in(call.args)))
    same = {
        tensor.untyped_storage()._cdata
        for _, tensor in tensors_in(last.args)
        if tensor.untyped_storage()._cdata in before and tensor.nbytes == tensor.untyped_storage().nbytes()
    }
    return [tensor for _, tensor in tensors_in(largest.args) if tensor.untyped_storage()._cdata in same]
