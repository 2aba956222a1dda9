"""Targets that are no classes: embedded ids whose products with the answers a loss wants high, as where items are ranked."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.graph import GradientEdge

from sickbay.exams.anatomy import kind
from sickbay.exams.graph_walk import nodes_below
from sickbay.exams.sensitivity import looked_up
from sickbay.exams.targets import Targets

_MAX_NODES = 400  # between a loss and the scores that it weighs
_KEEPS_ORDER = frozenset(
    ("View", "UnsafeView", "ReshapeAlias", "Unsqueeze", "Squeeze", "Expand", "Permute", "Transpose", "ToCopy", "Clone")
)
_HOPS = 8


def scored_targets(loss: Tensor) -> list[Targets]:
    """The ids whose scores, products of an answer and the id's row of a table, `loss` wants higher; counted = has influence on `loss`.

    Ids of which any score is wanted lower are none: they are the sampled negatives.
    """
    found: list[Targets] = []
    for node, ids in _scores(loss):
        try:
            (wanted,) = torch.autograd.grad(loss, [GradientEdge(node, 0)], retain_graph=True, allow_unused=True)
        except RuntimeError:
            continue
        if wanted is None or wanted.numel() != ids.numel() or bool((wanted > 0).any()) or not bool((wanted < 0).any()):
            continue
        found.append(Targets(ids.detach().long(), (wanted < 0).reshape(ids.shape), None, True, scored=_look_ups(loss, ids)))
    return found


def _scores(loss: Tensor) -> list[tuple[Any, Tensor]]:
    """Each node near `loss` that multiplies looked-up rows with something and sums over the features; the ids looked up."""
    found: list[tuple[Any, Tensor]] = []
    queue: list[Any] = [loss.grad_fn]
    seen: set[Any] = set()
    while queue and len(seen) < _MAX_NODES:
        node = queue.pop(0)
        if node is None or node in seen:
            continue
        seen.add(node)
        product = node.next_functions[0][0] if kind(node) == "Sum" else node
        if product is not None and kind(product) == ("Mul" if product is not node else "Bmm"):
            operands = [_rows(edge) for edge, _ in product.next_functions]
            ids = [operand for operand in operands if operand is not None]
            if len(ids) == 1:  # two look-ups are two inputs of a factorization, not an answer and its target
                found.append((node, ids[0]))
                continue
        queue.extend(edge for edge, _ in node.next_functions)
    return found


def _look_ups(loss: Tensor, ids: Tensor) -> int:
    """How often these very ids are looked up below `loss`."""
    found = (looked_up(node, node.name())[0] for node in nodes_below(loss.grad_fn))
    return sum(other is not None and other.shape == ids.shape and torch.equal(other, ids) for other in found)


def _rows(node: Any) -> Tensor | None:
    """The ids `(B, T)` whose rows `node` gives, reshaped and cast at most; None if it gives something else."""
    for _ in range(_HOPS):
        if node is None:
            return None
        ids, _ = looked_up(node, node.name())
        if ids is not None:
            return ids if ids.dim() == 2 else None
        if kind(node) not in _KEEPS_ORDER:
            return None
        node = node.next_functions[0][0]
    return None
