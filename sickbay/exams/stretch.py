"""What is kept of the loss between the model's output and `backward`, for a step whose gradient turns out not to be finite.

Backward frees the graph, and a hand-written loss cannot be called again; so the few operations whose derivative can
be infinite at a finite point have their saved operands held until the step is over.
"""

from __future__ import annotations

import contextlib
import difflib
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from sickbay.exams.graph_walk import arguments, by_age, nodes_below, overloads, plain, shape_of
from sickbay.exams.operand import kinds, node_operation

MAX_NODES = 40
MAX_BYTES = 16 << 20  # of saved operands that are held from a backward to the end of its step
# What has an infinite derivative at some finite operand, by the names torch gives their nodes.
_INFINITE_SOMEWHERE = ["Sqrt", "Rsqrt", "Log", "Log2", "Log10", "Log1P", "Pow", "Div", "Reciprocal", "Norm", "LinalgVectorNorm"]
_INFINITE_SOMEWHERE += ["Acos", "Asin", "Acosh", "Atanh", "Atan2", "Std", "Var", "Xlogy", "Logit", "Cdist", "Erfinv"]
RISKY = frozenset(f"{name}Backward{version}" for name in _INFINITE_SOMEWHERE for version in range(5))

# One autograd node of a recorded stretch: its name, the function the user called, the user's `file:line`.
MadeNode = tuple[str, str, str]
Segments = list[list[MadeNode]]


@dataclass
class Held:
    """A risky node of the current step: its name, its place among the noted nodes, what it saved, its number of operands."""

    name: str
    place: int
    saved: dict[str, Any]
    operands: int
    shape: torch.Size | None

    @property
    def nbytes(self) -> int:
        return sum(value.nbytes for value in self.saved.values() if isinstance(value, Tensor))


@dataclass
class Fault:
    """An operation of the loss whose derivative is not finite: `func(*args)` is the operation, `gradient` what it yields from ones."""

    name: str
    source: str
    func: Any
    args: tuple[Any, ...]
    gradient: Tensor
    chain: list[str] = field(default_factory=list)


class Stretch:
    """`note` before every backward, `forget` after the step. `segments`: what LossLines recorded, to give nodes their lines."""

    def __init__(self, segments: Segments | None = None) -> None:
        self.segments: Segments = [] if segments is None else segments
        self._names: list[tuple[int, str]] = []
        self._held: list[Held] = []

    def note(self, loss: Any, root_outputs_known: bool = False) -> None:
        """The nodes next to the loss are named and the risky ones' saved operands held; nothing when the loss can be rebuilt anyway.

        Never raises. Up to 40 nodes: 12 microseconds beneath a cross-entropy, 36 with 13 risky nodes (measured on one CPU core).
        """
        if root_outputs_known:
            return
        try:
            nodes = nodes_below(loss.grad_fn, MAX_NODES) if getattr(loss, "grad_fn", None) is not None else []
            for node in nodes:
                name = type(node).__name__
                self._names.append((node._sequence_nr(), name))
                if name in RISKY:
                    with contextlib.suppress(RuntimeError):  # an operand was overwritten since: backward itself will complain
                        if not has_hooks(node):
                            kept = {key[7:]: getattr(node, key) for key in saved_names(type(node))}
                            self._hold(Held(name, node._sequence_nr(), kept, len(node.next_functions), shape_of(node)))
        except Exception:  # what cannot be noted is not worth a failing script
            self._held.clear()

    def _hold(self, held: Held) -> None:
        """`held` and as many of those before it as keep within MAX_BYTES: backward would have freed all of them."""
        size = held.nbytes
        while self._held and size + sum(before.nbytes for before in self._held) > MAX_BYTES:
            self._held.pop(0)
        if size <= MAX_BYTES:
            self._held.append(held)

    def forget(self) -> None:
        """Every tensor and name is let go."""
        self._names.clear()
        self._held.clear()

    def lines(self, names: list[str]) -> list[str]:
        """The user's line for each of `names`, a graph's latest nodes in the order they were made; "" where no recorded stretch agrees."""
        best: tuple[int, list[str]] = (0, [""] * len(names))
        for segment in self.segments:
            tail = names[-(len(segment) + 8) :]
            offset = len(names) - len(tail)
            matcher = difflib.SequenceMatcher(None, tail, [made[0] for made in segment], autojunk=False)
            found = [""] * len(names)
            matched = 0
            for start, other, size in matcher.get_matching_blocks():
                matched += size
                for index in range(size):
                    found[offset + start + index] = segment[other + index][2]
            if matched >= best[0] and matched:
                best = (matched, found)
        return best[1]

    def line_of(self, node: Any, nodes: list[Any]) -> str:
        """The user's line that made `node`, one of the graph's `nodes`; "" if none is known."""
        ordered = by_age(nodes)
        lines = self.lines([made.name() for made in ordered])
        return next((line for made, line in zip(ordered, lines) if made is node), "")

    def fault(self) -> Fault | None:
        """The held operation nearest the loss whose derivative at its saved operands is not finite; None if all are."""
        ordered = sorted(name for name in self._names if name[0] < 1 << 62)
        lines = dict(zip((number for number, _ in ordered), self.lines([name for _, name in ordered])))
        for held in sorted(self._held, key=lambda held: -held.place):
            found = derivative(held)
            if found is not None and kinds(found[2]):
                chain = [node_operation(name) for number, name in reversed(ordered) if number < held.place][:6]
                return Fault(node_operation(held.name), lines.get(held.place, ""), *found, chain)
        return None


def saved_names(kind: type) -> tuple[str, ...]:
    """The names of what nodes of this type save."""
    known = _saved_names.get(kind)
    if known is None:
        known = _saved_names[kind] = tuple(name for name in dir(kind) if name.startswith("_saved_"))
    return known


_saved_names: dict[type, tuple[str, ...]] = {}


def has_hooks(node: Any) -> bool:
    """True if looking at what `node` saved would call somebody: activation checkpointing would run the forward again.

    Where torch cannot tell (before SavedTensor had `unpack_hook`), nothing is looked at.
    """
    raw = [getattr(node, f"_raw{name}", None) for name in saved_names(type(node))]
    return any(getattr(saved, "unpack_hook", saved) is not None for saved in raw if saved is not None)


def derivative(held: Held) -> tuple[Any, tuple[Any, ...], Tensor] | None:
    """The held operation, its arguments, and its gradient for ones: that of the first operand where it is not finite, else of the first."""
    operation = node_operation(held.name)
    values = {name: plain(value) for name, value in held.saved.items()}
    result = values.get("result")
    inputs: list[Tensor | None] = [None] * held.operands
    if operation == "sqrt" and isinstance(result, Tensor):
        inputs = [result.detach() ** 2]
    elif operation in ("rsqrt", "reciprocal") and isinstance(result, Tensor):
        inputs = [result.detach() ** (-2 if operation == "rsqrt" else -1)]

    def look_up(name: str) -> Any:
        value = values.get(name)
        if value is None and name == "self":  # a numerator that nothing needed
            return torch.ones(held.shape or ())
        return value

    for function in overloads(operation):
        args = arguments(function._schema, inputs, look_up)
        if args is None:
            continue
        operands = [
            value.detach().clone().requires_grad_() if isinstance(value, Tensor) and value.is_floating_point() else value for value in args
        ]
        try:
            with torch.enable_grad():
                out = function(*operands)
                leaves = [value for value in operands if isinstance(value, Tensor) and value.requires_grad]
                gradients = torch.autograd.grad(out, leaves, torch.ones_like(out), allow_unused=True)
        except (RuntimeError, TypeError, ValueError, IndexError):
            continue
        known = [gradient for gradient in gradients if gradient is not None]
        ill = [gradient for gradient in known if kinds(gradient)]
        if known:
            return function, args, (ill or known)[0]
    return None
