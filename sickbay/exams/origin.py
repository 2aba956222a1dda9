"""Follow NaN and infinities through a re-run: which operation made the ones that arrive, and which were meant (masks) or never used."""

from __future__ import annotations

import sys
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from sickbay.exams.operand import finite, flat, is_mask_sized, kinds, named_operands
from sickbay.exams.trace import ModulePath, conditions_of
from sickbay.patient import ForwardCall, bare, is_user_file, tensors_in

MASK_MAKERS = {"masked_fill", "where", "full", "full_like", "new_full", "fill", "scalar_tensor", "lift_fresh", "triu", "tril"}
MASK_MAKERS |= {"index_put", "index_fill", "copy", "masked_scatter", "scatter", "constant_pad_nd", "select_scatter", "slice_scatter"}
MASK_ADDERS = {"add", "sub", "mul", "_to_copy", "rsub", "copy"}
OVERWRITERS = {"copy_", "fill_", "zero_", "normal_", "uniform_", "random_", "exponential_", "bernoulli_", "set_"}
LOSSES = ("nll_loss", "binary_cross_entropy")
KEPT_OPERAND_BYTES = 1 << 30
MAX_FOUND = 256


@dataclass(eq=False)
class Seen:
    """One operation of the re-run. `sequence`: its autograd node's number; `parents`: the operations its operands came from, by index."""

    index: int
    func: Any
    name: str
    module: str
    source: str
    sequence: int
    parents: tuple[int, ...] = ()
    args: tuple[Any, ...] | None = None
    kwargs: dict[str, Any] = field(default_factory=dict)


@dataclass(eq=False)
class Origin:
    """Where non-finite values began. `seen`, `args`: the operation and its operands before it ran.

    `node`, `forward`: in the backward pass, the autograd node at work and the operation that it differentiates.
    """

    kind: Literal["input", "weight", "operation"]
    name: str
    result: Tensor
    seen: Seen | None = None
    args: tuple[Any, ...] = ()
    kwargs: dict[str, Any] = field(default_factory=dict)
    forward: Seen | None = None
    node: str = ""


def storage(tensor: Tensor) -> int:
    """What identifies the memory of `tensor`: views of one tensor share it."""
    return int(tensor.untyped_storage()._cdata)


class OriginWatch(TorchDispatchMode):
    """Sees every operation below autograd; `origins` maps memory to the indices in `found` of what made it non-finite.

    Memory that is non-finite without an origin is so on purpose. With `keep`, forward operands stay alive up to a bound.
    `source`: the user's line to give for operations outside the model, such as a loss that is computed again.
    """

    def __init__(self, path: ModulePath, call: ForwardCall, keep: bool) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.found: list[Origin] = []
        self.origins: dict[int, frozenset[int]] = {}
        self.operations: list[Seen] = []
        self.by_sequence: dict[int, Seen] = {}
        self._makers: dict[int, int] = {}
        self._path, self._call = path, call
        self._left = KEPT_OPERAND_BYTES if keep else 0
        self.source = ""

    def admit(self, root: nn.Module) -> None:
        """Non-finite inputs and weights are known as origins; masks among them are known as meant."""
        for name, tensor in named_inputs(self._call):
            seen = kinds(tensor)
            if seen and not (seen == {"-inf"} and is_additive_mask(tensor)):
                self._begin(Origin("input", name, tensor), tensor)
        for name, parameter in root.named_parameters():
            if kinds(parameter):
                self._begin(Origin("weight", name, parameter), parameter)
        for name, buffer in root.named_buffers():
            if "nan" in kinds(buffer):
                self._begin(Origin("weight", name, buffer), buffer)

    def of(self, tensor: Tensor) -> list[Origin]:
        """The origins of what is not finite in `tensor`; empty if it is finite or meant to be so."""
        return [self.found[index] for index in sorted(self.origins.get(storage(tensor), ()))] if kinds(tensor) else []

    def chain(self, seen: Seen, limit: int = 6) -> list[str]:
        """The names of the operations that led to `seen`'s operands, nearest first."""
        names: list[str] = []
        queue, known = list(seen.parents), set(seen.parents)
        while queue and len(names) < limit:
            operation = self.operations[queue.pop(0)]
            names.append(operation.name)
            new = [parent for parent in operation.parents if parent not in known]
            known.update(new)
            queue.extend(new)
        return names

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        schema = func._schema
        name = schema.name.split("::")[-1]
        before = clones_of_written(schema, args) if schema.is_mutable else args
        node = torch._C._current_autograd_node()
        result = func(*args, **kwargs)
        operands = [value for value in flat((args, tuple(kwargs.values()))) if isinstance(value, Tensor)]
        seen = self._note(func, name, operands, args, kwargs, backward=node is not None and not torch.is_grad_enabled())
        values = [value for value in flat((before, tuple(kwargs.values()))) if isinstance(value, Tensor)]
        if name in OVERWRITERS:
            operands, values = operands[1:], values[1:]
        for output in (value for value in flat(result) if isinstance(value, Tensor)):
            self._judge(seen, node, output, operands, values, before, kwargs)
        return result

    def _note(self, func: Any, name: str, operands: list[Tensor], args: Any, kwargs: Any, backward: bool) -> Seen:
        parents = tuple(dict.fromkeys(self._makers[key] for key in map(storage, operands) if key in self._makers))
        sequence = -1 if backward else torch._C._autograd._get_sequence_nr() - 1
        seen = Seen(len(self.operations), func, name, self._path.current, "" if backward else self._line(), sequence, parents)
        self.operations.append(seen)
        if sequence >= 0 and self.by_sequence.setdefault(sequence, seen) is seen and self._left > 0 and not func._schema.is_mutable:
            self._left -= sum(tensor.nbytes for tensor in operands)
            seen.args, seen.kwargs = args, kwargs
        return seen

    def _judge(self, seen: Seen, node: Any, output: Tensor, operands: list[Tensor], values: list[Tensor], args: Any, kwargs: Any) -> None:
        key = storage(output)
        self._makers[key] = seen.index
        if finite(output):
            if output.nbytes >= output.untyped_storage().nbytes():
                self.origins.pop(key, None)
            return
        known = [(self.origins.get(storage(tensor)), value) for tensor, value in zip(operands, values)]
        real = frozenset().union(*(origins for origins, value in known if origins and not finite(value)))
        if real:
            self.origins[key] = real
            return
        bad = kinds(output)
        ill = [value for value in values if not finite(value)]
        strange = [value for value in ill if "nan" in kinds(value)]
        if strange and storage(strange[0]) != key and storage(strange[0]) not in self._makers:
            self._begin(Origin("input", "a tensor the model holds", strange[0]), output)
        elif meant(seen.name.rstrip("_"), bad, ill, values, args, kwargs):
            self.origins.pop(key, None)
        else:
            forward = self.by_sequence.get(node._sequence_nr()) if node is not None and seen.sequence < 0 else None
            if is_users(node):  # the operation stands in a backward that the user wrote, and is named by itself
                seen.source, seen.module = self._line(), forward.module if forward is not None else seen.module
                forward = node = None
            self._begin(
                Origin("operation", seen.name, output, seen, args, kwargs, forward, node.name() if node is not None else ""), output
            )

    def _begin(self, origin: Origin, tensor: Tensor) -> None:
        if len(self.found) < MAX_FOUND:
            origin.result = origin.result.detach().clone() if origin.kind == "operation" else origin.result
            self.found.append(origin)
        self.origins[storage(tensor)] = frozenset({len(self.found) - 1})

    def _line(self) -> str:
        """The user's innermost line inside the re-run; where the library alone is running, the line that called the model."""
        if self.source:
            return self.source
        frame = sys._getframe(2)
        while frame is not None and frame.f_code is not replay.__code__:
            if is_user_file(frame.f_code.co_filename):
                return f"{frame.f_code.co_filename}:{frame.f_lineno}"
            frame = frame.f_back  # type: ignore[assignment]
        return self._call.source


def is_users(node: Any) -> bool:
    """True for the node of an autograd.Function of the user's: torch numbers its own nodes."""
    return node is not None and bool(node.name().endswith("Backward"))


def meant(name: str, bad: frozenset[str], ill: list[Tensor], values: list[Tensor], args: Any, kwargs: Any) -> bool:
    """True when a non-finite result is by design: an infinity written or passed on as a mask, never a NaN, never in a loss.

    `bad`: kinds in the result; `ill`: the operands that are infinite on purpose; `values`: all operands.
    """
    if "nan" in bad or name.startswith(LOSSES):
        return False
    if ill:
        return True
    scalars = [value for value in flat((args, tuple(kwargs.values()))) if isinstance(value, (int, float)) and not isinstance(value, bool)]
    if name in MASK_MAKERS and any(abs(value) == float("inf") for value in scalars):
        return True
    if name in ("lift_fresh", "scalar_tensor"):
        return True
    return bad == {"-inf"} and name in MASK_ADDERS | MASK_MAKERS and any(is_mask_sized(value) for value in values)


def is_additive_mask(tensor: Tensor) -> bool:
    """True when the finite entries are zero or negative: such a tensor is added to attention scores."""
    rest = tensor[torch.isfinite(tensor)]
    return rest.numel() == 0 or float(rest.max()) <= 0


def clones_of_written(schema: Any, args: tuple[Any, ...]) -> tuple[Any, ...]:
    """`args` with copies of the tensors that the operation is about to overwrite."""
    written = [argument.alias_info is not None and argument.alias_info.is_write for argument in schema.arguments]
    return (
        tuple(value.clone() if write and isinstance(value, Tensor) else value for write, value in zip(written, args)) + args[len(written) :]
    )


def named_inputs(call: ForwardCall) -> list[tuple[str, Tensor]]:
    """The tensors given to the root module, by the name of its forward's argument."""
    import inspect

    try:
        names = list(inspect.signature(bare(call.module).forward).parameters)
    except (TypeError, ValueError):
        names = []
    given = {(names[index] if index < len(names) else f"input {index}"): value for index, value in enumerate(call.args)}
    return list(tensors_in({**given, **call.kwargs}))


def replay(call: ForwardCall, keep: bool = False) -> tuple[Any, OriginWatch]:
    """The root's output for `call`, run again under an OriginWatch.

    Changes RNG and buffers: for a forked copy, or between save and restore.
    """
    module = bare(call.module)
    with conditions_of(call), ModulePath(module) as path:
        watch = OriginWatch(path, call, keep)
        watch.admit(module)
        with watch:
            output = module(*call.args, **call.kwargs)
    return output, watch


def differentiate(result: Tensor, cotangent: Tensor, watch: OriginWatch, module: nn.Module) -> list[Origin]:
    """The origins of what is not finite in the gradients of `module`'s parameters, from `cotangent` at `result`, under the same watch."""
    parameters = [parameter for parameter in module.parameters() if parameter.requires_grad]
    with watch:
        gradients = torch.autograd.grad(result, parameters, cotangent, allow_unused=True)
    found: dict[int, Origin] = {}
    for gradient in gradients:
        if gradient is not None:
            found.update({watch.found.index(origin): origin for origin in watch.of(gradient)})
    return [found[index] for index in sorted(found)]


def operands_of(origin: Origin) -> list[tuple[str, Tensor]]:
    """The operands of the operation an origin names, in the forward pass where it is known."""
    if origin.forward is not None and origin.forward.args is not None:
        return named_operands(origin.forward.func._schema, origin.forward.args, origin.forward.kwargs)
    return named_operands(origin.seen.func._schema, origin.args, origin.kwargs) if origin.seen else [(origin.name, origin.result)]
