"""What a report says of one tensor: its shape, its range, how much of it is not finite; and operations by the name users know."""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

# The smallest number of a type is used as "never attend here"; two such masks added together overflow to -inf by design.
MASK_SHARE_OF_MINIMUM = 0.5
LARGEST_MASK = -1e30

_DIVISIONS = ("aten::div", "aten::div_", "aten::remainder", "aten::fmod")
_FAMILIAR = {
    "_softmax": "softmax",
    "_log_softmax": "log_softmax",
    "nll_loss_forward": "nll_loss",
    "nll_loss2d_forward": "nll_loss",
    "nll_loss2d": "nll_loss",
    "native_layer_norm": "layer_norm",
    "native_group_norm": "group_norm",
    "native_batch_norm": "batch_norm",
    "native_dropout": "dropout",
    "linalg_vector_norm": "norm",
    "_to_copy": "to",
    "to_copy": "to",
    "_fused_rms_norm": "rms_norm",
    "binary_cross_entropy_with_logits": "binary_cross_entropy_with_logits",
}


def familiar(name: str) -> str:
    """The name users know an aten operation by: `_softmax` and `softmax_` are `softmax`."""
    if name in _FAMILIAR:
        return _FAMILIAR[name]
    if "scaled_dot_product" in name:
        return "scaled_dot_product_attention"
    return name.strip("_")


def node_operation(node_name: str) -> str:
    """The aten name of the operation an autograd node belongs to: `NllLossBackward0` is `nll_loss`."""
    base = re.sub(r"Backward\d*$", "", node_name.split("::")[-1])
    base = re.sub(r"(?<=\d)D(?=[A-Z]|$)", "d", base)  # NllLoss2D is nll_loss2d
    return re.sub(r"(?<=[a-z0-9])(?=[A-Z])", "_", base).lower()


def is_number(tensor: Tensor) -> bool:
    """True for a dense tensor of real or complex numbers with at least one element, the only kind that can be non-finite here."""
    return (tensor.is_floating_point() or tensor.is_complex()) and tensor.layout == torch.strided and tensor.numel() > 0


def _reals(tensor: Tensor) -> Tensor:
    """The elements of `tensor`, a complex one's real and imaginary parts along one more dimension."""
    tensor = tensor.detach()
    if tensor.is_complex():
        return torch.view_as_real(tensor.resolve_conj())
    return tensor.float() if tensor.element_size() == 1 else tensor  # the 8-bit floats have no arithmetic


def _wide(tensor: Tensor) -> Tensor:
    """`tensor` in a format that every operation is written for."""
    return tensor.detach() if tensor.is_complex() else tensor.detach().float()


def finite(tensor: Tensor) -> bool:
    """True when no element is NaN or infinite; also for anything but dense numbers. One pass and no copy where all is well."""
    if not is_number(tensor):
        return True
    tensor = _reals(tensor)
    total = tensor.sum(dtype=torch.float64 if tensor.dtype == torch.float64 else torch.float32)
    # A sum of finite elements can overflow; a finite sum cannot hide a NaN or an infinity.
    return bool(torch.isfinite(total)) or bool(torch.isfinite(tensor).all())


def kinds(tensor: Tensor) -> frozenset[str]:
    """Which of "nan", "+inf", "-inf" are among the elements; empty for a finite tensor and for anything but dense numbers."""
    if finite(tensor):
        return frozenset()
    tensor = _reals(tensor)
    found = {"nan": torch.isnan(tensor), "+inf": tensor == float("inf"), "-inf": tensor == float("-inf")}
    return frozenset(kind for kind, where in found.items() if bool(where.any()))


def count_nonfinite(tensor: Tensor) -> int:
    """The number of NaN and infinite elements."""
    return int((~torch.isfinite(_wide(tensor))).sum()) if is_number(tensor) else 0


def describe(name: str, tensor: Tensor) -> dict[str, Any]:
    """`tensor` in JSON: name, shape, dtype, numbers of non-finite and zero elements, range and absmax of the finite ones."""
    fact: dict[str, Any] = {"name": name, "shape": list(tensor.shape), "dtype": str(tensor.dtype).removeprefix("torch.")}
    if tensor.layout != torch.strided or tensor.is_complex() or tensor.numel() == 0:
        return fact
    values = tensor.detach()
    values = values.to(torch.float64 if values.dtype == torch.float64 else torch.float32) if tensor.is_floating_point() else values
    rest = values[torch.isfinite(values)] if tensor.is_floating_point() else values.reshape(-1)
    fact["nonfinite"] = values.numel() - rest.numel()
    fact["nan"] = int(torch.isnan(values).sum()) if tensor.is_floating_point() else 0
    fact["zeros"] = int((values == 0).sum())
    fact["min"], fact["max"] = (float(rest.min()), float(rest.max())) if rest.numel() else (None, None)
    fact["absmax"] = max(abs(fact["min"]), abs(fact["max"])) if rest.numel() else None
    return fact


def bad_row(tensor: Tensor) -> int | None:
    """The first index along the leading dimension whose slice is not finite; None for a scalar or a finite tensor."""
    if tensor.dim() == 0 or not kinds(tensor):
        return None
    rows = (~torch.isfinite(_wide(tensor))).reshape(tensor.shape[0], -1).any(dim=1)
    return int(rows.nonzero()[0, 0])


def fully_masked_rows(operand: Tensor, dim: int = -1) -> int:
    """The rows along dimension `dim` that hold nothing but -inf, as a softmax that may attend nowhere sees them."""
    if not -operand.dim() <= dim < operand.dim() or not operand.shape[dim]:
        return 0
    return int((operand == float("-inf")).all(dim=dim).sum())


def is_mask_sized(tensor: Tensor) -> bool:
    """True when `tensor` holds the very negative numbers that stand for "masked" in additive masks."""
    if not is_number(tensor) or tensor.is_complex():
        return False
    limit = min(torch.finfo(tensor.dtype).min * MASK_SHARE_OF_MINIMUM, 0.0)
    return float(tensor.detach().float().min()) <= max(limit, LARGEST_MASK)


def flat(value: Any) -> Iterator[Any]:
    """The leaves of nested lists and tuples."""
    if isinstance(value, (list, tuple)):
        for item in value:
            yield from flat(item)
    else:
        yield value


def named_operands(schema: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> list[tuple[str, Tensor]]:
    """The tensors among an operation's arguments, each with its name in the schema (a list's items numbered); a number that divides too."""
    names = [argument.name for argument in schema.arguments]
    named: list[tuple[str, Tensor]] = []
    for name, value in [*zip(names, args), *kwargs.items()]:
        if isinstance(value, Tensor):
            named.append((name, value))
        elif name == "other" and isinstance(value, (int, float)) and schema.name in _DIVISIONS:
            named.append((name, torch.tensor(float(value))))
        elif isinstance(value, (list, tuple)):
            named.extend((f"{name}[{index}]", item) for index, item in enumerate(value) if isinstance(item, Tensor))
    return named
