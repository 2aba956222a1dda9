"""Recognises attention in a traced forward and reads off the factor its scores are multiplied with before the softmax.

Hand-written attention is found from its softmax upwards: through masks and views to the product of queries and keys, and from
there on through positions and views to the projections, collecting every scalar factor on the way. Fused attention carries its
factor as an argument; factors applied to the queries or keys before it count too.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from sickbay.exams.trace import Operation

_FUSED = ("scaled_dot_product", "_scaled_dot_product")
_PRODUCTS = frozenset(("bmm", "baddbmm", "matmul", "dot"))
_PROJECTIONS = frozenset(("mm", "addmm", "linear", "bmm", "embedding", "convolution", "native_layer_norm"))
_NORMS = frozenset(("rsqrt", "native_layer_norm", "_fused_rms_norm", "linalg_vector_norm", "rms_norm", "norm"))
_MAX_STEPS = 60
_Q_OVER_K = 0.25  # tolerance for an initialisation that carries the factor itself


@dataclass
class Attention:
    """One attention call: `factor` as applied to the scores in `steps` (name, factor); `scores` after scaling and masking."""

    module: str
    source: str
    head_dim: int
    factor: float
    steps: list[tuple[str, float]] = field(default_factory=list)
    declared: bool = False
    scores: Tensor | None = None


@dataclass
class _Climb:
    factor: float = 1.0
    steps: list[tuple[str, float]] = field(default_factory=list)
    normalised: bool = False
    projection: Operation | None = None


def attentions(operations: list[Operation]) -> list[Attention]:
    """Every attention in `operations`, in order of execution."""
    made_by = {id(out): op for op in operations for out in op.outputs}
    found: list[Attention] = []
    for op in operations:
        attention = None
        if op.name.startswith(_FUSED):
            attention = _fused(op, made_by)
        elif op.name in ("_softmax", "softmax"):
            attention = _by_hand(op, made_by)
        if attention is not None:
            found.append(attention)
    return found


def _fused(op: Operation, made_by: dict[int, Operation]) -> Attention | None:
    queries, keys = op.inputs[0], op.inputs[1]
    scale = op.kwargs.get("scale")
    own = float(scale) if scale is not None else 1.0 / math.sqrt(queries.shape[-1])
    up_q, up_k = _climb(queries, made_by), _climb(keys, made_by)
    steps = [("fused", own), *up_q.steps, *up_k.steps]
    factor = own * up_q.factor * up_k.factor
    scores = queries[:1].detach().float() @ keys[:1].detach().float().transpose(-1, -2) * own if queries.shape[1] == keys.shape[1] else None
    if scores is not None and any(value is True for value in (*op.args, *op.kwargs.values())):
        length, width = scores.shape[-2:]
        blocked = scores.new_ones(length, width).triu(1).bool()
        scores = scores.masked_fill(blocked, -math.inf)
    return _attention(op, queries.shape[-1], factor, steps, up_q, up_k, scores)


def _by_hand(op: Operation, made_by: dict[int, Operation]) -> Attention | None:
    scores = op.inputs[0]
    if scores.dim() < 3 or op.args[1] not in (-1, scores.dim() - 1):
        return None
    climbed = _Climb()
    product = _find_product(scores, made_by, climbed, tuple(scores.shape[-2:]))
    if product is None:
        return None
    left, right = product.inputs[-2], product.inputs[-1]
    if left.dim() < 3 or right.dim() < 3:
        return None
    up_q, up_k = _climb(left, made_by), _climb(right, made_by)
    steps = [*climbed.steps, *up_q.steps, *up_k.steps]
    head_dim = left.shape[-1]
    return _attention(op, head_dim, climbed.factor * up_q.factor * up_k.factor, steps, up_q, up_k, scores[:2])


def _attention(
    op: Operation, head_dim: int, factor: float, steps: list[tuple[str, float]], up_q: _Climb, up_k: _Climb, scores: Any
) -> Attention:
    by_design = _initialised_for_it(factor, head_dim, up_q, up_k) or _one_over_dim(factor, head_dim, steps)
    declared = up_q.normalised or up_k.normalised or by_design
    return Attention(op.module, op.source, head_dim, factor, steps, declared, scores)


def _initialised_for_it(factor: float, head_dim: int, up_q: _Climb, up_k: _Climb) -> bool:
    """True for T5's way: scores are not scaled, the query projection is drawn smaller by the square root of the head dimension instead."""
    stds = [_weight_std(climb.projection) for climb in (up_q, up_k)]
    if not all(stds) or factor != 1.0:
        return False
    return abs(stds[0] / stds[1] * math.sqrt(head_dim) - 1) < _Q_OVER_K


def _one_over_dim(factor: float, head_dim: int, steps: list[tuple[str, float]]) -> bool:
    """True for muP's single factor 1/d; two factors of 1/sqrt(d) are a mistake."""
    scaling = [value for _, value in steps if value != 1.0]
    return head_dim > 1 and len(scaling) == 1 and abs(factor * head_dim - 1) < 1e-3


def _weight_std(projection: Operation | None) -> float:
    if projection is None or projection.name not in ("mm", "addmm", "linear"):
        return 0.0
    weight = projection.inputs[-1]
    return float(weight.detach().float().std()) if weight.numel() > 1 else 0.0


def _scalar(op: Operation) -> float | None:
    """The scalar that a mul or div applies, as a factor; None if it works on two full tensors."""
    if op.name not in ("mul", "mul_", "div", "div_"):
        return None
    others = [a for a in op.args[:2] if not (isinstance(a, Tensor) and a.numel() > 1)]
    if len(others) != 1:
        return None
    value = float(others[0])
    if op.name.startswith("div"):
        return 1.0 / value if value and isinstance(op.args[0], Tensor) and op.args[0].numel() > 1 else None
    return value


def _find_product(
    tensor: Tensor, made_by: dict[int, Operation], climbed: _Climb, shape: tuple[int, ...], depth: int = 0
) -> Operation | None:
    op = made_by.get(id(tensor))
    if op is None or depth > 24:
        return None
    if op.name in _PRODUCTS:
        alpha = op.kwargs.get("alpha", 1) if op.name == "baddbmm" else 1
        if alpha != 1:
            climbed.factor *= float(alpha)
            climbed.steps.append(("baddbmm", float(alpha)))
        return op
    scalar = _scalar(op)
    candidates = [t for t in op.inputs if t.is_floating_point() and tuple(t.shape[-2:]) == shape] or [
        t for t in op.inputs if t.is_floating_point() and t.numel() == tensor.numel()
    ]
    for candidate in candidates:
        deeper = _Climb()
        product = _find_product(candidate, made_by, deeper, shape, depth + 1)
        if product is not None:
            if scalar is not None:
                climbed.factor *= scalar
                climbed.steps.append((op.name, scalar))
            climbed.factor *= deeper.factor
            climbed.steps.extend(deeper.steps)
            return product
    return None


def _climb(tensor: Tensor, made_by: dict[int, Operation]) -> _Climb:
    """Upwards from queries or keys to their projection, collecting scalar factors; positions (rotary) are walked through."""
    climb = _Climb()
    for _ in range(_MAX_STEPS):
        op = made_by.get(id(tensor))
        if op is None:
            break
        if op.name in _NORMS:
            climb.normalised = True
            break
        if op.name in _PROJECTIONS:
            climb.projection = op
            break
        scalar = _scalar(op)
        if scalar is not None:
            climb.factor *= scalar
            climb.steps.append((op.name, scalar))
        floats = [t for t in op.inputs if t.is_floating_point() and t.numel() > 1]
        if not floats:
            break
        if op.name in ("mul", "div") and any(_made_by_norm(t, made_by) for t in floats):
            climb.normalised = True
            break
        tensor = max(floats, key=lambda t: (id(t) in made_by, t.numel()))
    return climb


def _made_by_norm(tensor: Tensor, made_by: dict[int, Operation]) -> bool:
    """True if `tensor` is a normaliser: the result of a norm, possibly clamped, expanded or turned over."""
    for _ in range(6):
        op = made_by.get(id(tensor))
        if op is None:
            return False
        if op.name in _NORMS:
            return True
        if op.name not in ("clamp_min", "expand", "add", "reciprocal", "unsqueeze", "clamp", "expand_as", "view"):
            return False
        if not op.inputs:
            return False
        tensor = op.inputs[0]
    return False
