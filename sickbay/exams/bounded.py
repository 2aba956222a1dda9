"""What the logits' form forbids the loss: the lowest value that a squashed score leaves reachable, and log-probabilities that are none."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from sickbay.exams.anatomy import RESHAPES, Anatomy, kind
from sickbay.exams.graph_walk import saved

_SQUASHES = {"Softmax": (0.0, 1.0), "Sigmoid": (0.0, 1.0), "Tanh": (-1.0, 1.0), "Hardsigmoid": (0.0, 1.0)}
_CLAMPS = {"Clamp": ("min", "max"), "Hardtanh": ("min_val", "max_val")}
_PICKS = ("NllLoss", "NllLoss2D", "Gather", "Index")
_ROWS = 256


def bounds(node: Any) -> tuple[str, float, float] | None:
    """(operation, low, high) where constants alone lie between `node`'s output and a squashing operation; None if nothing bounds it."""
    scale, shift = 1.0, 0.0
    for _ in range(24):
        name = kind(node) if node is not None else ""
        if name in _SQUASHES or name in _CLAMPS:
            low, high = _SQUASHES.get(name) or tuple(_number(saved(node, side)) for side in _CLAMPS[name])
            ends = sorted((scale * low + shift, scale * high + shift))
            return (name.lower(), *ends) if all(map(math.isfinite, ends)) else None  # type: ignore[return-value]
        followed = [child for child, _ in node.next_functions if child is not None] if node is not None else []
        if len(followed) != 1:
            return None
        if name in ("Mul", "Div"):
            factor = saved(node, "other")
            size = _largest(factor) if node.next_functions[0][0] is not None else _largest(saved(node, "self"))
            if size is None or (name == "Div" and (node.next_functions[0][0] is None or size == 0)):
                return None
            scale = scale * size if name == "Mul" else scale / size
        elif name == "Neg":
            scale = -scale
        elif name not in RESHAPES and name not in ("Add", "Sub", "Rsub"):
            return None
        node = followed[0]
    return None


def _number(value: Any) -> float:
    return float(value) if value is not None else math.nan


def _largest(value: Any) -> float | None:
    """The largest size in a constant factor: a number, or dropout's mask."""
    if isinstance(value, Tensor):
        return float(value.abs().max()) if value.numel() else None
    return float(abs(value)) if isinstance(value, (int, float)) else None


def lowest_cross_entropy(gap: float, classes: int, smoothing: float) -> float:
    """Nats above the best possible where the right class can lead by `gap` at most: softmax of one score `gap` over `classes` - 1 zeros."""
    right = 1 - smoothing + smoothing / classes

    def value(lead: float) -> float:
        return lead + math.log1p((classes - 1) * math.exp(-lead)) - right * lead

    best = math.log(right * (classes - 1) / (1 - right)) if right < 1 else math.inf
    return value(gap) - (value(best) if math.isfinite(best) else 0.0) if gap < best else 0.0


def lowest_binary(low: float, high: float, targets: Tensor) -> float:
    """The same of binary cross-entropy with scores in [low, high], mean over `targets` in [0, 1]."""
    wanted = targets.detach().float().clamp(0, 1)
    best = torch.logit(wanted, eps=1e-7)
    reached = F.binary_cross_entropy_with_logits(best.clamp(low, high), wanted)
    return float(reached - F.binary_cross_entropy_with_logits(best, wanted))


def squashed(anatomy: Anatomy, smoothing: float, source: str) -> Iterator[dict[str, Any]]:
    """A reading `loss_floor` for each classification loss in the graph, 0 where nothing bounds its logits."""
    for node in anatomy.of_kind("NllLoss", "NllLoss2D"):
        given = saved(node, "self")
        if isinstance(given, Tensor) and given.dim() >= 2:
            yield _floor(0.0, None, math.log(max(given.shape[1], 2)), given.shape[1], source)
    for node in anatomy.of_kind("LogSoftmax"):
        picked = any(kind(user) in _PICKS for user in _users(anatomy, node))
        result, dim = saved(node, "result"), saved(node, "dim")
        if not picked or not isinstance(result, Tensor) or result.dim() < 2:
            continue
        classes = result.shape[int(dim) if dim is not None else -1]
        bound = bounds(node.next_functions[0][0])
        if bound and _spread(result, int(dim if dim is not None else -1)) > (bound[2] - bound[1]) * (1 + 1e-3) + 1e-3:
            bound = None  # a tensor was added, which autograd does not tell from a number
        floor = lowest_cross_entropy(bound[2] - bound[1], classes, smoothing) if bound and classes > 1 else 0.0
        yield _floor(floor, bound, math.log(max(classes, 2)), classes, source)
    for node in anatomy.of_kind("BinaryCrossEntropyWithLogits"):
        targets = saved(node, "target")
        bound = bounds(node.next_functions[0][0])
        floor = lowest_binary(bound[1], bound[2], targets) if bound and isinstance(targets, Tensor) else 0.0
        yield _floor(floor, bound, math.log(2), 2, source)


def _spread(result: Tensor, dim: int) -> float:
    """The largest difference between two classes' finite scores."""
    kept = torch.isfinite(result)
    highest = result.masked_fill(~kept, -torch.inf).amax(dim)
    lowest = result.masked_fill(~kept, torch.inf).amin(dim)
    return float((highest - lowest).max())


def _floor(floor: float, bound: tuple[str, float, float] | None, chance: float, classes: int, source: str) -> dict[str, Any]:
    note: dict[str, Any] = {"chance": chance, "classes": classes}
    if bound:
        note |= {"op": bound[0], "low": bound[1], "high": bound[2]}
    return {"signal": "loss_floor", "value": floor, "note": note, "source": source}


def _users(anatomy: Anatomy, node: Any) -> list[Any]:
    """What takes `node`'s output, reshaped at most."""
    found: list[Any] = []
    pending = [node]
    while pending and len(found) < 16:
        for user, _ in anatomy.consumers.get(pending.pop(), ()):
            name = kind(user)
            found.append(user)
            if name in RESHAPES and name not in _PICKS:
                pending.append(user)
    return found


def nll_inputs(anatomy: Anatomy, source: str) -> Iterator[dict[str, Any]]:
    """A reading `probability_sum` for each nll_loss: the sum over classes of the exponentials of what it was given, 1 if it is right."""
    for node in anatomy.of_kind("NllLoss", "NllLoss2D"):
        given = saved(node, "self")
        if isinstance(given, Tensor) and given.dim() >= 1 and given.numel():
            rows = (
                (given.movedim(1, -1) if given.dim() > 2 else given).reshape(-1, given.shape[1 if given.dim() > 1 else 0])[:_ROWS].float()
            )
            rows = rows[torch.isfinite(rows).all(-1)]
            if len(rows):
                note = {"least": rows.min().item(), "largest": rows.max().item(), "plain_sum": rows.sum(-1).median().item()}
                value = torch.logsumexp(rows, -1).median().exp().item()
                yield {"signal": "probability_sum", "value": min(value, 1e30), "note": note, "source": source}


def first_losses(anatomy: Anatomy, source: str) -> Iterator[dict[str, Any]]:
    """A reading `initial_loss` for each classification loss: the mean of its counted targets, whatever reduction and weights it has."""
    for node in anatomy.of_kind("NllLoss", "NllLoss2D"):
        given, targets, ignored = saved(node, "self"), saved(node, "target"), saved(node, "ignore_index")
        if not isinstance(given, Tensor) or not isinstance(targets, Tensor) or given.dim() < 2:
            continue
        classes = given.shape[1]
        flat = given.movedim(1, -1).reshape(-1, classes).float()
        wanted = targets.reshape(-1)
        counted = (wanted != (ignored if ignored is not None else -100)) & (wanted >= 0) & (wanted < classes)
        if not bool(counted.any()) or classes < 2:
            continue
        picked = -flat[counted].gather(1, wanted[counted].unsqueeze(1)).squeeze(1)
        spread = flat[counted].std(-1).mean().item()
        note = {"chance": math.log(classes), "classes": classes, "targets": int(counted.sum()), "logit_std": spread}
        yield {"signal": "initial_loss", "value": picked.mean().item(), "note": note, "source": source}
