"""Matrix products and attention written out by hand, and what torch's own would save. For use inside a forked copy."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from sickbay.exams.op_profile import Profile, Timed, least

_SPREAD = 8  # times the larger operand: a product that is much larger than its factors
_LEAST_SHARE = 0.1  # of the forward's seconds
_PASSED_ON = frozenset(
    [
        "view",
        "_unsafe_view",
        "transpose",
        "permute",
        "expand",
        "unsqueeze",
        "clone",
        "_to_copy",
        "mul",
        "div",
        "add",
        "sub",
        "masked_fill",
        "where",
        "detach",
        "alias",
        "t",
        "slice",
    ]
)


def examine(profile: Profile, most: float) -> list[dict[str, Any]]:
    """Readings of `broadcast_gain` and `attention_gain`: shares of the forward's seconds, forward and backward measured alike."""
    return [*_broadcasts(profile, most), *_attention(profile, most)]


# --- multiplied by broadcasting, then summed --------------------------------------------------------------------------------
def _broadcasts(profile: Profile, most: float) -> list[dict[str, Any]]:
    made: dict[int, Timed] = {}
    pairs: list[tuple[Timed, Timed]] = []
    for operation in profile.operations:
        if operation.name == "mul" and isinstance(operation.result, Tensor):
            factors = [value for value in operation.args[:2] if isinstance(value, Tensor)]
            if len(factors) == 2 and operation.result.numel() >= _SPREAD * max(factor.numel() for factor in factors):
                made[operation.makes[0]] = operation
        elif operation.name == "sum" and operation.reads and operation.reads[0] in made and len(operation.args) > 1:
            pairs.append((made[operation.reads[0]], operation))
    spent = sum(product.seconds + total.seconds for product, total in pairs)
    if not pairs or spent < _LEAST_SHARE * profile.seconds:
        return []
    product, total = max(pairs, key=lambda pair: pair[0].seconds)
    a, b = product.args[:2]
    dims = [int(dim) % product.result.dim() for dim in (total.args[1] or range(product.result.dim()))]
    equation, left, right = _equation(a, b, product.result.dim(), dims)
    plain = total.result.squeeze(dims) if len(total.args) > 2 and total.args[2] else total.result
    if not torch.allclose(torch.einsum(equation, left, right), plain, rtol=1e-3, atol=1e-4 * float(plain.abs().max() + 1e-9)):
        return []
    written = _both_ways(lambda x, y: (x * y).sum(dims), (a, b), most)
    multiplied = _both_ways(lambda x, y: torch.einsum(equation, x, y), (left, right), most)
    saved = spent / profile.seconds * max(0.0, 1 - multiplied / written)
    note = {"shape": list(product.result.shape), "count": len(pairs), "seconds": written, "product_seconds": multiplied}
    return [{"signal": "broadcast_gain", "value": saved, "where": product.module, "source": product.line, "note": note}]


def _equation(a: Tensor, b: Tensor, rank: int, dims: list[int]) -> tuple[str, Tensor, Tensor]:
    """The einsum of (a * b).sum(dims), and both factors without their axes of length 1."""
    letters = "abcdefghijklmnop"[:rank]
    sides = []
    for tensor in (a, b):
        names = letters[rank - tensor.dim() :]
        kept = [axis for axis in range(tensor.dim()) if tensor.shape[axis] != 1 and tensor.stride(axis) != 0]
        index = tuple(slice(None) if axis in kept else 0 for axis in range(tensor.dim()))
        sides.append(("".join(names[axis] for axis in kept), tensor[index]))
    present = set(sides[0][0]) | set(sides[1][0])
    out = "".join(letter for axis, letter in enumerate(letters) if axis not in dims and letter in present)
    return f"{sides[0][0]},{sides[1][0]}->{out}", sides[0][1], sides[1][1]


def _both_ways(function: Any, factors: tuple[Tensor, ...], most: float) -> float:
    """Processor seconds of `function` and its backward."""
    leaves = [factor.detach().clone().requires_grad_() for factor in factors]

    def once() -> None:
        with torch.enable_grad():
            function(*leaves).sum().backward()

    return least(once, most, times=3)


# --- attention ------------------------------------------------------------------------------------------------------------------
def _attention(profile: Profile, most: float) -> list[dict[str, Any]]:
    chains = _written_out(profile.operations)
    spent = sum(operation.seconds for chain in chains for operation in chain)
    if not chains or spent < _LEAST_SHARE * profile.seconds:
        return []
    chain = max(chains, key=lambda operations: sum(operation.seconds for operation in operations))
    first, softmax, last = chain[0], next(o for o in chain if "softmax" in o.name), chain[-1]
    scores = softmax.result
    if scores.dim() < 3:
        return []
    query, key, value = first.args[0], first.args[1].transpose(1, 2), last.args[1]
    if query.dim() != 3 or value.dim() != 3 or query.shape[0] != value.shape[0] or key.shape[1] != value.shape[1]:
        return []
    query, key, value = (part[None].detach().contiguous() for part in (query, key, value))
    mask = torch.zeros(scores.shape[-2:], dtype=query.dtype)

    def written(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return torch.softmax(q @ k.transpose(-1, -2) * 0.1 + mask, -1) @ v

    by_hand = _both_ways(written, (query, key, value), most)
    fused = _both_ways(lambda q, k, v: F.scaled_dot_product_attention(q, k, v, attn_mask=mask), (query, key, value), most)
    saved = spent / profile.seconds * max(0.0, 1 - fused / by_hand)
    note = {"shape": list(scores.shape), "count": len(chains), "seconds": by_hand, "fused_seconds": fused}
    return [{"signal": "attention_gain", "value": saved, "where": softmax.module, "source": softmax.line or first.line, "note": note}]


def _written_out(operations: list[Timed]) -> list[list[Timed]]:
    """The operations of each bmm, softmax, bmm whose weights go nowhere else and meet no dropout."""
    since: dict[int, list[Timed]] = {}  # storage -> operations since the product that it comes from
    chains = []
    for operation in operations:
        behind = next((since[storage] for storage in operation.reads if storage in since), None)
        makes = operation.makes[0] if operation.makes else 0
        if operation.name in ("bmm", "baddbmm"):
            softmaxed = behind is not None and any("softmax" in each.name for each in behind)
            if softmaxed and operation.reads and operation.reads[0] in since:
                chains.append([*behind, operation])  # type: ignore[misc]
            elif operation.name == "bmm":
                since[makes] = [operation]
        elif behind is not None and (operation.name in _PASSED_ON or operation.name in ("_softmax", "_safe_softmax")):
            since[makes] = behind if operation.view else [*behind, operation]
    return chains
