"""What one step's live autograd graph says of the model: which weights multiply in which order, what they multiply, and their gradients."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from sickbay.exams.graph_walk import LEAF, by_age, nodes_below, saved

MAX_NODES = 60_000
RESHAPES = frozenset(
    [
        *("View", "UnsafeView", "ReshapeAlias", "Transpose", "Permute", "T", "ToCopy", "Clone", "Slice", "Select", "Squeeze", "Unsqueeze"),
        *("Expand", "Alias", "Index", "IndexSelect", "AsStrided", "Split", "SplitWithSizes", "Chunk", "Unbind", "Repeat", "MaskedFill"),
    ]
)
_TURNS = frozenset(("T", "Transpose", "Permute"))
# The saved operand that each edge of a multiplying node is multiplied with.
_PARTNERS: dict[str, dict[int, str]] = {
    "Addmm": {2: "mat1", 1: "mat2"},
    "Mm": {1: "self", 0: "mat2"},
    "Bmm": {1: "self", 0: "mat2"},
    "Baddbmm": {2: "batch1", 1: "batch2"},
    "Convolution": {1: "input"},
    "Linear": {1: "input"},
    "MkldnnLinear": {1: "input"},
}


def kind(node: Any) -> str:
    """The operation of an autograd node: `Addmm` of AddmmBackward0."""
    return str(node.name().rsplit("::", 1)[-1].partition("Backward")[0])


@dataclass
class Weight:
    """A leaf that multiplies: `depth` counts them in order of first use; `data` is what it multiplies where that needs no gradient.

    `turned`: it is used transposed, so its last dimension is the fan-in, as in a linear layer; `node`: the operation.
    """

    tensor: Tensor
    depth: int
    node: Any
    turned: bool
    data: Tensor | None = None
    gradient: Tensor | None = field(default=None, repr=False)

    @property
    def fan_in(self) -> int:
        """The number of terms that one output sums."""
        shape = self.tensor.shape
        if kind(self.node) == "Convolution":
            return self.tensor[0].numel()
        return int(shape[-1] if self.turned or kind(self.node) in ("Linear", "MkldnnLinear") else shape[-2])


class Anatomy:
    """The graph below `loss`: its nodes, who uses whose output, and the weights that multiply, in order of first use."""

    def __init__(self, loss: Tensor) -> None:
        self.loss = loss
        self.nodes = nodes_below(loss.grad_fn, MAX_NODES)
        self.consumers: dict[Any, list[tuple[Any, int]]] = {}
        for node in self.nodes:
            for index, (child, _) in enumerate(node.next_functions):
                if child is not None:
                    self.consumers.setdefault(child, []).append((node, index))
        self.weights = self._weights()

    def _weights(self) -> list[Weight]:
        found = []
        for leaf in (node for node in self.nodes if node.name().endswith(LEAF)):
            tensor = getattr(leaf, "variable", None)
            if isinstance(tensor, Tensor) and tensor.dim() >= 2 and min(tensor.shape) >= 1 and tensor.is_floating_point():
                uses = [use for use in self._uses(leaf) if kind(use[0]) in _PARTNERS]
                if uses:
                    node, index, turned = min(uses, key=lambda use: int(use[0]._sequence_nr()))
                    found.append(Weight(tensor, 0, node, turned, self._data(node, index)))
        found.sort(key=lambda weight: int(weight.node._sequence_nr()))
        for depth, weight in enumerate(found):
            weight.depth = depth
        return found

    def _uses(self, leaf: Any) -> Iterator[tuple[Any, int, bool]]:
        """The operations that take the leaf, reshaped and cast at most: node, edge, whether it comes transposed."""
        pending = [(leaf, False, 0)]
        while pending:
            node, turned, hops = pending.pop()
            for consumer, index in self.consumers.get(node, ()):
                if kind(consumer) in RESHAPES and hops < 8:
                    pending.append((consumer, turned != (kind(consumer) in _TURNS), hops + 1))
                else:
                    yield consumer, index, turned

    @staticmethod
    def _data(node: Any, index: int) -> Tensor | None:
        """The other operand where no gradient flows into it: what the first layers multiply."""
        name = _PARTNERS[kind(node)].get(index)
        edge = next((other for other, partner in _PARTNERS[kind(node)].items() if other != index), None)
        edge = 0 if kind(node) in ("Convolution", "Linear", "MkldnnLinear") else edge
        if name is None or edge is None or node.next_functions[edge][0] is not None:
            return None
        value = saved(node, name)
        return value if isinstance(value, Tensor) and value.is_floating_point() else None

    def differentiate(self) -> None:
        """Every weight's `gradient` is that of the loss. The graph is used up: for a forked copy only."""
        tensors = [weight.tensor for weight in self.weights]
        try:
            gradients: Any = torch.autograd.grad(self.loss, tensors, allow_unused=True)
        except RuntimeError:
            # Activation checkpointing of the older kind refuses to name its inputs; it allows backward, which across ranks would talk.
            if torch.distributed.is_available() and torch.distributed.is_initialized():
                raise
            for tensor in tensors:
                tensor.grad = None
            self.loss.backward()
            gradients = [tensor.grad for tensor in tensors]
        for weight, gradient in zip(self.weights, gradients):
            weight.gradient = gradient

    def of_kind(self, *kinds: str) -> list[Any]:
        """The nodes of these operations in the order in which the forward pass made them."""
        return by_age([node for node in self.nodes if kind(node) in kinds])

    def normalised_after(self, node: Any) -> bool:
        """True where nothing but a normalisation sees `node`'s output, shifted, reshaped and rectified at most."""
        for _ in range(12):
            users = self.consumers.get(node, [])
            if len({id(user) for user, _ in users}) != 1:
                return False
            node = users[0][0]
            name = kind(node)
            if "Norm" in name and "Vector" not in name:
                return True
            if name not in RESHAPES and name not in ("Add", "Relu", "Gelu", "Silu", "LeakyRelu", "Mul", "MaxPool2DWithIndices"):
                return False
        return False
