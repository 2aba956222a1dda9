"""Parameters without a gradient: does the output depend on them all the same, and if so, which operation cut the graph?"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode, resolve_name

from sickbay.exams import fork
from sickbay.exams.graph_walk import nodes_below
from sickbay.exams.trace import conditions_of
from sickbay.patient import ForwardCall, Patient, bare, tensors_in, user_line

_TIMEOUT = 30.0
_HARMLESS = (
    "shape",
    "size",
    "dim",
    "numel",
    "stride",
    "is_",
    "__get__",
    "device",
    "dtype",
    "requires_grad",
    "eq",
    "ne",
    "lt",
    "gt",
    "le",
    "ge",
    "isnan",
    "isfinite",
    "isinf",
    "__set__",
    "zeros_like",
    "ones_like",
    "empty_like",
    "full_like",
    "new_",
    "__bool__",
    "__len__",
    "format",
    "__repr__",
    "result_type",
)


def examine(patient: Patient, names: list[str]) -> dict[str, Any] | fork.NoAnswer:
    """`{changes_output, op, source}`: whether noise on `names` moves the output, and the first operation that drops gradients.

    Parameters that a gradient of the output would reach are left alone: it is the loss that does not use what they make.
    """
    calls = patient.training_calls()
    if not calls:
        return fork.NoAnswer("no forward pass through one outermost module was seen")
    answer: dict[str, Any] | fork.NoAnswer = fork.ask(lambda: _look(calls[-1], names), _TIMEOUT)
    return answer


def _look(call: ForwardCall, names: list[str]) -> dict[str, Any]:
    module = bare(call.module)
    with conditions_of(call):
        outputs = [tensor for _, tensor in tensors_in(module(*call.args, **call.kwargs))]
    before = [tensor.detach().clone() for tensor in outputs]
    connected = _leaves(outputs)
    cut = _Cut()
    with conditions_of(call), cut:
        module(*call.args, **call.kwargs)
    generator = torch.Generator().manual_seed(0)
    wanted = set(names)
    with torch.no_grad():
        for name, parameter in module.named_parameters():
            if name in wanted and id(parameter) not in connected:
                scale = parameter.std() if parameter.numel() > 1 else parameter.abs().mean()
                parameter.add_(torch.randn(parameter.shape, generator=generator).to(parameter) * max(float(scale), 0.1))
    with conditions_of(call):
        after = [tensor.detach() for _, tensor in tensors_in(module(*call.args, **call.kwargs))]
    changes = any(a.shape != b.shape or not _same(a, b) for a, b in zip(before, after))
    found: dict[str, Any] = {"changes_output": changes}
    if changes:
        found.update(op=cut.op or _checkpointing(module, call), source=cut.source)
    return found


def _same(a: Tensor, b: Tensor) -> bool:
    """True for equal tensors of one shape; where both are NaN nothing has moved."""
    return bool(((a == b) | ((a != a) & (b != b))).all())


def _leaves(outputs: list[Tensor]) -> set[int]:
    """The ids of the parameters that a backward from `outputs` would reach."""
    nodes = [node for tensor in outputs if tensor.grad_fn is not None for node in nodes_below(tensor.grad_fn)]
    return {id(node.variable) for node in nodes if isinstance(getattr(node, "variable", None), Tensor)}


class _Cut(TorchFunctionMode):
    """Remembers the first operation that takes something with a gradient and gives floats, or a choice, without one."""

    def __init__(self) -> None:
        super().__init__()
        self.op, self.source = "", ""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        result = func(*args, **kwargs)
        name = resolve_name(func) or getattr(func, "__name__", str(func))
        short = name.rsplit(".", 1)[-1]
        if self.op or short.startswith(_HARMLESS) or short == "__get__":
            return result
        if not any(isinstance(t, Tensor) and t.requires_grad for t in _flat((args, kwargs))):
            return result
        made = [t for t in _flat(result) if isinstance(t, Tensor)]
        if (made and not any(t.requires_grad for t in made)) or short in ("item", "tolist", "numpy"):
            self.op, self.source = short, user_line(2)
        return result


def _flat(value: Any) -> list[Any]:
    if isinstance(value, (tuple, list)):
        return [leaf for item in value for leaf in _flat(item)]
    if isinstance(value, dict):
        return [leaf for item in value.values() for leaf in _flat(item)]
    return [value]


def _checkpointing(module: nn.Module, call: ForwardCall) -> str:
    """The word "checkpoint" when a re-entrant activation checkpoint gets inputs without gradient: everything in it is then cut off."""
    from torch.utils.checkpoint import CheckpointFunction

    seen: list[bool] = []
    original: Any = CheckpointFunction.apply

    def apply(function: Any, preserve: Any, *args: Any) -> Any:
        seen.append(not any(isinstance(a, Tensor) and a.requires_grad for a in args))
        return original(function, preserve, *args)

    CheckpointFunction.apply = apply  # type: ignore[method-assign]
    try:
        with conditions_of(call):
            module(*call.args, **call.kwargs)
    finally:
        CheckpointFunction.apply = original  # type: ignore[method-assign]
    return "checkpoint" if any(seen) else ""
