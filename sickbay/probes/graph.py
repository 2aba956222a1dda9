"""Walks autograd graphs: which leaves a loss reaches, and how far from the loss each lies."""

from __future__ import annotations

from collections import deque
from typing import Any

from torch import Tensor

MAX_NODES = 200_000


def leaves_of(loss: Tensor) -> list[Tensor]:
    """The leaf tensors that `loss.backward()` would give a gradient, nearest to the loss first."""
    return [leaf for leaf, _ in leaves_with_distance(loss)]


def leaves_with_distance(loss: Tensor) -> list[tuple[Tensor, int]]:
    """Each leaf that gets a gradient from `loss` with its distance (graph edges) from the loss, nearest first."""
    found: list[tuple[Tensor, int]] = []
    start: Any = loss.grad_fn
    if start is None:
        return found
    seen, queue = {start}, deque([(start, 0)])
    while queue and len(seen) < MAX_NODES:
        node, distance = queue.popleft()
        variable = getattr(node, "variable", None)
        if isinstance(variable, Tensor):
            found.append((variable, distance))
        for following, _ in node.next_functions:
            if following is not None and following not in seen:
                seen.add(following)
                queue.append((following, distance + 1))
    return found


def is_scaled(loss: Tensor, made: int) -> bool:
    """True if `loss` is what the node with sequence number `made` gave, times or over a constant at most.

    Then the captured call suffices to rebuild it.
    """
    node: Any = loss.grad_fn
    for _ in range(3):
        if node is None or node._sequence_nr() == made:
            return node is not None
        if node.name() not in ("MulBackward0", "DivBackward0") or sum(child is not None for child, _ in node.next_functions) != 1:
            return False
        node = next(child for child, _ in node.next_functions if child is not None)
    return node is not None and int(node._sequence_nr()) == made
