"""Who sees whom without running anything again: gradients of single answers with respect to embedded tokens, through the loss's own graph.

For models that are no module and no function that could be called again: tensors with requires_grad and a forward written out in the loop.
A gradient tells what a small change would do, so a path through argmax or detach stays unseen: perturbation comes first where it can.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.autograd.graph import GradientEdge

from sickbay.exams.influences import Mixing, Past, even_rows
from sickbay.exams.sequences import Lookup, Observation, is_ids, token_lookups
from sickbay.exams.targets import Alignment

_MAX_NODES = 20_000


@dataclass
class Graph:
    """A loss and the nodes of its graph that matter. `embedded`: node of each look-up; `readout`: the one that gave log-probabilities.

    `batch_statistics`: a spread was taken over rows, as a batch-norm written by hand does.
    """

    loss: Tensor
    seen: Observation
    embedded: dict[int, Any]
    readout: Any
    readout_shape: tuple[int, ...]
    batch_statistics: bool = False

    def tokens(self) -> list[list[Lookup]]:
        return token_lookups(self.seen)

    def sensitivity(self, group: list[Lookup], aligned: Alignment, asked: Tensor) -> Tensor:
        """The gradient norm `(B, T)` of the answers `asked` (bool `(B, n)`, a random direction each) towards each embedded token."""
        weights = torch.randn(*aligned.values.shape, self.readout_shape[-1], generator=torch.Generator().manual_seed(0))
        weights = weights * asked[..., None]
        if aligned.flipped != (aligned.time_axis == 0):
            weights = weights.transpose(0, 1)
        total = torch.zeros(group[0].ids.shape, dtype=torch.float64)
        edges = [GradientEdge(self.embedded[lookup.occurrence], 0) for lookup in group]
        outputs = [GradientEdge(self.readout, 0)]
        for gradient in torch.autograd.grad(outputs, edges, [weights.reshape(self.readout_shape)], retain_graph=True, allow_unused=True):
            if gradient is not None:
                total += gradient.double().reshape(*total.shape, -1).norm(dim=-1)
        return total if aligned.time_axis == 1 else total.t()


def graph_of(loss: Tensor) -> Graph | None:
    """The graph of `loss` if it holds a classification loss over rows and trainable token look-ups; otherwise None."""
    seen = Observation()
    embedded: dict[int, Any] = {}
    readout: Any = None
    shape: tuple[int, ...] = ()
    stack: list[Any] = [loss.grad_fn]
    visited: set[Any] = set()
    spread = False
    while stack and len(visited) < _MAX_NODES:
        node = stack.pop()
        if node is None or node in visited:
            continue
        visited.add(node)
        name = node.name()
        if (name.startswith("NllLossBackward") and readout is None) or (
            name.startswith("GatherBackward") and readout is None and node._saved_index.shape[-1:] == (1,)
        ):
            readout, shape = node.next_functions[0][0], tuple(node._saved_self.shape)
        spread = spread or _over_batch(node, name)
        ids, padding_idx = looked_up(node, name)
        if ids is not None:
            embedded[len(seen.lookups)] = node
            grid = ids if ids.dim() == 2 else ids[None]
            seen.lookups.append(Lookup(len(seen.lookups), None, grid.long(), tuple(ids.shape), padding_idx, ""))
        stack.extend(edge for edge, _ in node.next_functions)
    if readout is None or not shape or not seen.lookups:
        return None
    return Graph(loss, seen, embedded, readout, shape, spread)


def _over_batch(node: Any, name: str) -> bool:
    """True for a variance over the first of two axes or over all axes but one."""
    if not name.startswith(("VarBackward", "StdBackward", "VarMeanBackward", "StdMeanBackward", "NativeBatchNorm")):
        return False
    operand = getattr(node, "_saved_self", None)
    if not isinstance(operand, Tensor):
        return name.startswith("NativeBatchNorm")
    axes = {int(axis) % (1 << 64) for axis in getattr(node, "_saved_dim", None) or ()}
    axes = {axis - (1 << 64) if axis >= 1 << 63 else axis for axis in axes}  # saved as unsigned
    return 0 in {axis % operand.dim() for axis in axes} and len(axes) == operand.dim() - 1


def looked_up(node: Any, name: str) -> tuple[Tensor | None, int]:
    """(ids, padding_idx or -1) of a node that looks rows of a trainable table up by ids; (None, -1) of any other."""
    if name.startswith("EmbeddingBackward") and is_ids(node._saved_indices):
        padding_idx = int(node._saved_padding_idx)
        return node._saved_indices, padding_idx if padding_idx < 2**63 else -1
    if name.startswith("IndexBackward"):
        indices = [index for index in node._saved_indices if index is not None]
        if len(indices) == 1 and is_ids(indices[0]):
            return indices[0], -1
    return None, -1


def mixing(graph: Graph, group: list[Lookup], aligned: Alignment, real: Tensor) -> tuple[Mixing, Past | None]:
    """Future, rows and past as gradients tell them: one answer per even row is asked at a time. `real`: bool `(B, T)`, no padding."""
    found = Mixing()
    batch, length = real.shape
    even = even_rows(batch)
    pairs = blocked = nearest = nearest_blocked = span = 0
    positions = torch.arange(length)
    for share in (1 / 3, 2 / 3):
        counted = aligned.counted & real[:, : aligned.counted.shape[1]]
        chosen = [(row, _nth(counted[row], share)) for row in range(0, batch, 2) if bool(counted[row].any())]
        if not chosen:
            continue
        asked = torch.zeros_like(aligned.counted)
        for row, position in chosen:
            asked[row, position] = True
        moved = graph.sensitivity(group, aligned, asked)
        own = float(torch.stack([moved[row, : position + 1].max() for row, position in chosen]).mean())
        if own == 0.0:
            continue
        found.alive = True
        if batch > 1:
            found.rows = max(found.rows or 0.0, float(moved[~even[:, 0]].max()) / own)
        for row, position in chosen:
            ahead = moved[row][(positions > position) & real[row]]
            if len(ahead):
                future = float(ahead.max()) / own
                if found.future is None or future > found.future:
                    found.future, found.cut, found.affected = future, position + 1, float((ahead > 0).double().mean())
            behind = (positions < position) & real[row]
            still = behind & (moved[row] == 0)
            pairs, blocked = pairs + int(behind.sum()), blocked + int(still.sum())
            if position and bool(behind[position - 1]):
                nearest, nearest_blocked = nearest + 1, nearest_blocked + int(still[position - 1])
            reached = (behind & ~still).nonzero().flatten()
            span = max(span, position - int(reached.min()) if len(reached) else 0)
    return found, Past(pairs, blocked / pairs, nearest_blocked / nearest if nearest else 0.0, span) if pairs else None


def _nth(mask: Tensor, share: float) -> int:
    """The position at `share` of the True ones, of which there is at least one."""
    places = mask.nonzero().flatten()
    return int(places[int(len(places) * share)])


def padding(graph: Graph, group: list[Lookup], aligned: Alignment, mask: Tensor) -> float | None:
    """Gradient of counted answers at real tokens towards padding, over that towards real tokens; None if no row tells."""
    rows = mask.any(1, keepdim=True)
    asked = aligned.counted & ~mask[:, : aligned.counted.shape[1]] & rows
    if not bool(asked.any()):
        return None
    moved = graph.sensitivity(group, aligned, asked)
    own = float(moved[rows & ~mask].mean())
    return float(moved[rows & mask].mean()) / own if own > 0 else None
