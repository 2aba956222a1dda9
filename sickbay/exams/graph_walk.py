"""Values in a live autograd graph: from the tensors its nodes saved, and by running simple operations again; then the culprit among them.

Only what lies on the non-finite path is looked at, so a walk from the loss costs little however deep the model is.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from sickbay.exams.operand import kinds, node_operation
from sickbay.exams.origin import meant

MAX_NODES = 5000
MAX_DEPTH = 32
LEAF = "AccumulateGrad"
_UNSIGNED_MINUS = 1 << 63
# Tensor arguments that carry no gradient, in the order in which they are left out until the count agrees with the node's.
_WITHOUT_GRADIENT = ("target", "indices", "index", "mask", "condition", "weight", "pos_weight", "running_mean", "running_var")
_RESHAPES = frozenset(("view", "reshape_alias", "unsafe_view", "reshape"))
_SAME = frozenset(("clone", "alias", "detach", "lift_fresh"))


@dataclass
class Culprit:
    """The node whose result is not finite although its known operands are (or are masks): `func(*args)` if it could be run again."""

    node: Any
    operation: str
    operands: list[tuple[str, Tensor]]
    result: Tensor | None
    call: tuple[Any, tuple[Any, ...]] | None = None
    phase: str = "forward"
    chain: list[str] = field(default_factory=list)


def nodes_below(root: Any, limit: int = MAX_NODES) -> list[Any]:
    """The autograd nodes from `root` on, breadth first, at most `limit`."""
    found, seen = [root], {root}
    for node in found:
        for child, _ in node.next_functions:
            if child is not None and child not in seen and len(found) < limit:
                seen.add(child)
                found.append(child)
    return found


def by_age(nodes: list[Any]) -> list[Any]:
    """`nodes` in the order in which the forward pass made them, without the leaves."""
    return sorted((node for node in nodes if not node.name().endswith(LEAF)), key=lambda node: node._sequence_nr())


def saved(node: Any, name: str) -> Any:
    """What `node` saved under `name`; None if nothing, or if it was freed or overwritten since."""
    try:
        return plain(getattr(node, f"_saved_{name}", None))
    except RuntimeError:
        return None


def plain(value: Any) -> Any:
    """Dimensions as the user wrote them: torch shows a saved -1 as 2**64 - 1."""
    if isinstance(value, tuple):
        return tuple(plain(item) for item in value)
    if isinstance(value, int) and not isinstance(value, bool) and value >= _UNSIGNED_MINUS:
        return value - (1 << 64)
    return value.detach() if isinstance(value, Tensor) else value


def overloads(operation: str) -> Iterator[Any]:
    """The aten overloads that an autograd node of this name may stand for."""
    for name in (operation, f"_{operation}", f"{operation}_forward", f"special_{operation}"):
        packet = getattr(torch.ops.aten, name, None)
        if packet is not None:
            for overload in packet.overloads():
                function = getattr(packet, overload)
                if not overload.endswith("out") and not function._schema.is_mutable:
                    yield function


def differentiable(schema: Any, count: int) -> list[str] | None:
    """The names of the `count` tensor arguments that a node of this schema has edges for; None if that cannot be."""
    names = [argument.name for argument in schema.arguments if str(argument.type) in ("Tensor", "Optional[Tensor]")]
    for name in _WITHOUT_GRADIENT:
        if len(names) > count and name in names and names[0] != name:
            names.remove(name)
    return names if len(names) == count else None


class Graph:
    """The graph below `loss`; `value(node, index)` is an output's value where it can be known."""

    def __init__(self, loss: Tensor) -> None:
        self.nodes, self._output = nodes_below(loss.grad_fn), loss.output_nr
        self._known: dict[tuple[Any, int], Tensor | None] = {(loss.grad_fn, loss.output_nr): loss.detach()}
        self._calls: dict[Any, tuple[Any, tuple[Any, ...]]] = {}
        self._consumers: dict[tuple[Any, int], list[tuple[Any, int]]] = {}
        for node in self.nodes:
            for index, (child, output) in enumerate(node.next_functions):
                if child is not None:
                    self._consumers.setdefault((child, output), []).append((node, index))

    def value(self, node: Any, output: int = 0, depth: int = 0) -> Tensor | None:
        """The value of `node`'s output, or None."""
        key = (node, output)
        if key not in self._known:
            self._known[key] = None
            self._known[key] = self._find(node, output, depth)
        return self._known[key]

    def _find(self, node: Any, output: int, depth: int) -> Tensor | None:
        if node.name().endswith(LEAF):
            return node.variable.detach() if isinstance(node.variable, Tensor) else None
        shape = shape_of(node, output)
        own = saved(node, "result" if output == 0 else f"result{output}")
        own = saved(node, "result0") if own is None and output == 0 else own
        if isinstance(own, Tensor) and own.shape == shape:
            return own
        for consumer, index in self._consumers.get((node, output), ()):
            for name, tensor in self.saved_operands(consumer):
                if self.names(consumer)[index : index + 1] == [name] and tensor.shape == shape:
                    return tensor
        return self._rerun(node, shape, depth) if output == 0 and depth < MAX_DEPTH else None

    def names(self, node: Any) -> list[str]:
        """A name for each edge of `node`: the schema's arguments where they are known."""
        count = len(node.next_functions)
        for function in overloads(node_operation(node.name())):
            found = differentiable(function._schema, count)
            if found:
                return found
        return ["self"] if count == 1 else [f"operand {index}" for index in range(count)]

    def saved_operands(self, node: Any) -> list[tuple[str, Tensor]]:
        """The tensors that `node` saved of its operands (not its results), by name."""
        names = [name[7:] for name in dir(node) if name.startswith("_saved_") and "result" not in name]
        return [(name, value) for name in names for value in [saved(node, name)] if isinstance(value, Tensor)]

    def operands(self, node: Any, depth: int = 0) -> list[tuple[str, Tensor | None, Any]]:
        """Every tensor operand of `node`: name, value (None = unknown) and the node it came from (None = no gradient needed)."""
        kept = dict(self.saved_operands(node))
        listed: list[tuple[str, Tensor | None, Any]] = []
        for name, (child, output) in zip(self.names(node), node.next_functions):
            value = kept.pop(name, None)
            if value is None and child is not None:
                value = self.value(child, output, depth + 1)
            listed.append((name, value, child))
        return [*listed, *((name, value, None) for name, value in kept.items() if value.is_floating_point() or name == "target")]

    def _rerun(self, node: Any, shape: Any, depth: int) -> Tensor | None:
        operation = node_operation(node.name())
        inputs = [
            kept if kept is not None else self.value(child, output, depth + 1) if child is not None else None
            for (child, output), kept in zip(node.next_functions, (saved(node, name) for name in self.names(node)))
        ]
        known = [value for value in inputs if isinstance(value, Tensor)]
        with torch.no_grad():
            if operation in _RESHAPES and known:
                return known[0].reshape(shape)
            if operation == "expand" and known:
                return known[0].expand(shape)
            if operation in _SAME and known:
                return known[0]
            if operation == "masked_fill" and len(known) == 1 and isinstance(saved(node, "mask"), Tensor):
                # The fill value is not remembered; on a non-finite path it can only have been the usual -inf.
                return self._try(node, torch.ops.aten.masked_fill.Scalar, (known[0], saved(node, "mask"), float("-inf")), shape)
            if operation == "to_copy" and known:
                return self._try(node, torch.ops.aten._to_copy.default, (known[0],), shape, dtype=node._input_metadata[0].dtype)
            if operation in ("stack", "cat") and len(known) == len(inputs):
                return self._try(node, getattr(torch.ops.aten, operation).default, (known, saved(node, "dim")), shape)
            for function in overloads(operation):
                args = arguments(function._schema, inputs, lambda name: saved(node, name))
                result = self._try(node, function, args, shape) if args is not None else None
                if result is not None:
                    return result
        return None

    def _try(self, node: Any, function: Any, args: tuple[Any, ...], shape: Any, **kwargs: Any) -> Tensor | None:
        try:
            result = function(*args, **kwargs)
        except (RuntimeError, TypeError, IndexError, ValueError, NotImplementedError):
            return None
        first = result[0] if isinstance(result, tuple) else result
        if not isinstance(first, Tensor) or (shape is not None and first.shape != shape):
            return None
        if not kwargs:
            self._calls[node] = (function, args)
        return first.detach()

    def culprit(self) -> Culprit | None:
        """The earliest node whose non-finite result reaches the loss and did not come from its operands; None for a finite loss."""
        found: dict[Any, Culprit | None] = {}
        top = self._blame(self.nodes[0], found, 0)
        loss = self.value(self.nodes[0], self._output)
        return self._guilty(self.nodes[0]) if top is None and loss is not None and kinds(loss) else top

    def _blame(self, node: Any, found: dict[Any, Culprit | None], depth: int) -> Culprit | None:
        if node in found or depth > 400:
            return found.get(node)
        found[node] = None
        value = self.value(node)
        if node.name().endswith(LEAF):
            if value is not None and kinds(value):
                found[node] = Culprit(node, "", [("weight", value)], value, phase="weight")
            return found[node]
        operands = self.operands(node)
        below = [
            self._blame(child, found, depth + 1) for _, tensor, child in operands if child is not None and (tensor is None or kinds(tensor))
        ]
        guilty = [culprit for culprit in below if culprit is not None]
        if guilty:
            found[node] = min(guilty, key=age)
        elif value is not None and kinds(value):
            outside = [
                (name, tensor) for name, tensor, child in operands if child is None and tensor is not None and "nan" in kinds(tensor)
            ]
            ill = [tensor for _, tensor, _ in operands if tensor is not None and kinds(tensor)]
            everything = [tensor for _, tensor, _ in operands if tensor is not None]
            scalars = tuple(saved(node, name[7:]) for name in dir(node) if name.startswith("_saved_") and "sym" not in name)
            if outside:
                found[node] = Culprit(node, node_operation(node.name()), outside, outside[0][1], phase="input")
            elif operation_writes_mask(node) or meant(node_operation(node.name()), kinds(value), ill, everything, scalars, {}):
                found[node] = None
            else:
                found[node] = self._guilty(node)
        return found[node]

    def _guilty(self, node: Any) -> Culprit:
        value = self.value(node)
        if node not in self._calls and not node.name().endswith(LEAF):
            self._rerun(node, shape_of(node), 0)
        operands = [(name, tensor) for name, tensor, _ in self.operands(node) if tensor is not None]
        chain = [node_operation(child.name()) for child in nodes_below(node, 16)[1:] if not child.name().endswith(LEAF)][:6]
        return Culprit(node, node_operation(node.name()), operands, value, self._calls.get(node), chain=chain)


def shape_of(node: Any, output: int = 0) -> torch.Size | None:
    """The shape of `node`'s output in the forward pass; None if autograd does not know it."""
    known = node._input_metadata
    return torch.Size(known[output].shape) if output < len(known) else None


def operation_writes_mask(node: Any) -> bool:
    """True for masked_fill, whose -inf no node remembers: it is written by design."""
    return node_operation(node.name()) in ("masked_fill", "where")


def age(culprit: Culprit) -> int:
    """The order in which the forward pass came to `culprit`; weights are older than any operation."""
    return -1 if culprit.phase == "weight" else int(culprit.node._sequence_nr())


def arguments(schema: Any, inputs: list[Tensor | None], look_up: Any) -> tuple[Any, ...] | None:
    """Positional arguments for `schema` from the differentiable `inputs` and from what `look_up(name)` finds; None if one is missing."""
    names = differentiable(schema, len(inputs))
    if names is None:
        return None
    edges = dict(zip(names, inputs))
    filled: list[Any] = []
    value: Any
    for argument in itertools.takewhile(lambda argument: not argument.kwarg_only, schema.arguments):
        value = edges.get(argument.name)
        if value is None:
            value = look_up(argument.name)
        if value is None:
            if argument.has_default_value():
                value = argument.default_value
            elif str(argument.type) == "bool":
                value = False
            elif not str(argument.type).startswith("Optional"):
                return None
        if (str(argument.type) in ("Tensor", "Optional[Tensor]")) != isinstance(value, Tensor) and value is not None:
            return None
        filled.append(value)
    return tuple(filled)
