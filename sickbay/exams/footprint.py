"""What one training forward of a model keeps in memory, worked out on tensors that have shapes but no storage.

Exactly the kernels' own choice of what to keep for backward is counted, in milliseconds and without memory, also for a model of billions.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode

from sickbay.core.plan import STATE_COPIES, Parts
from sickbay.patient import mapped, tensors_in

_SIDE = 4  # an encoder, or a decoder, is at least one part in so many of the other


@dataclass
class Kept:
    """Bytes kept for backward: by block in order of first use, `around` them, and what else lives at the end of the forward."""

    blocks: dict[str, int] = field(default_factory=dict)
    around: int = 0
    boundary: int = 0
    outputs: int = 0
    logits: int = 0


def blocks_of(model: nn.Module) -> list[tuple[str, nn.Module]]:
    """The repeated blocks: the members of the module list (or sequence of like modules) with most parameters.

    Of an encoder-decoder those of both sides: also of lists beside it that are not much smaller and whose members hold several
    matrices.
    """
    found: list[tuple[int, list[tuple[str, nn.Module]]]] = []
    inside: tuple[str, ...] = ()
    for name, part in model.named_modules():
        if name.startswith(inside) or not isinstance(part, (nn.ModuleList, nn.Sequential)) or len(part) < 2:
            continue
        members = [(f"{name}.{key}" if name else key, child) for key, child in part.named_children()]
        if len({type(child) for _, child in members}) == 1:
            found.append((sum(p.numel() for p in part.parameters()), members))
            inside += (f"{name}." if name else "",)
    largest = max(found, key=lambda one: one[0], default=(0, []))
    if not largest[0]:
        return []
    sides = [members for size, members in found if members is largest[1] or (size * _SIDE >= largest[0] and _are_layers(members))]
    return [member for members in sides for member in members]


def _are_layers(members: list[tuple[str, nn.Module]]) -> bool:
    return all(sum(parameter.dim() > 1 for parameter in part.parameters()) > 1 for _, part in members)


def kept_by(model: nn.Module, forward: Callable[[], Any]) -> Kept:
    """What `forward()`, which calls `model` on shape-only tensors and gives its outputs, keeps. `model`'s hooks are as before."""
    own = {p.untyped_storage()._cdata for p in (*model.parameters(), *model.buffers())}
    kept, current = Kept(), [""]
    seen: dict[int, Any] = {}
    saved: set[int] = set()
    blocks = blocks_of(model)
    kept.blocks = {name: 0 for name, _ in blocks}

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage._cdata not in own and storage._cdata not in saved:
            saved.add(storage._cdata)
            seen[storage._cdata] = storage
            if current[0]:
                kept.blocks[current[0]] += storage.nbytes()
            else:
                kept.around += storage.nbytes()
        return tensor

    def enter(name: str, module: nn.Module, args: Any) -> None:
        current[0] = name
        first = next((tensor for _, tensor in tensors_in(args)), None)
        if first is not None:
            kept.boundary = max(kept.boundary, first.nbytes)

    def leave(module: nn.Module, args: Any, output: Any) -> None:
        current[0] = ""

    handles = [block.register_forward_pre_hook(functools.partial(enter, name)) for name, block in blocks]
    handles += [block.register_forward_hook(leave) for _, block in blocks]
    try:
        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            output = forward()
    finally:
        for handle in handles:
            handle.remove()
    for _, tensor in tensors_in(output):
        kept.logits = max(kept.logits, tensor.nbytes)
        if tensor.untyped_storage()._cdata not in saved:
            saved.add(tensor.untyped_storage()._cdata)
            kept.outputs += tensor.untyped_storage().nbytes()
    return kept


@contextlib.contextmanager
def without_memory() -> Iterator[FakeTensorMode]:
    """Inside, new tensors have no storage, and existing ones may be mixed in."""
    with FakeTensorMode(allow_non_fake_inputs=True) as mode, torch.enable_grad():
        yield mode


def imagined(mode: FakeTensorMode, value: Any) -> Any:
    """`value` with every tensor in it replaced by one without storage."""
    return mapped(value, lambda tensor: tensor if isinstance(tensor, torch._subclasses.FakeTensor) else mode.from_tensor(tensor.detach()))


def imagine_parameters(mode: FakeTensorMode, model: nn.Module) -> None:
    """`model`'s parameters and buffers are replaced by ones without storage, tied ones by one. Only for a copy that nobody else uses."""
    known: dict[int, Tensor] = {}
    for module in model.modules():
        for name, parameter in list(module._parameters.items()):
            if parameter is not None:
                if id(parameter) not in known:
                    known[id(parameter)] = nn.Parameter(mode.from_tensor(parameter.detach()), requires_grad=parameter.requires_grad)
                module._parameters[name] = known[id(parameter)]  # type: ignore[assignment]
        for name, buffer in list(module._buffers.items()):
            if buffer is not None:
                module._buffers[name] = mode.from_tensor(buffer)


def parts_of(model: nn.Module, kept: Kept, rows: int, optimizer: str = "adamw") -> Parts:
    """The parts of a step of `rows` rows with gradients and an optimizer of that kind (a key of STATE_COPIES)."""
    parameters = list(model.parameters())
    weights = sum(p.nbytes for p in parameters) + sum(buffer.nbytes for buffer in model.buffers())
    gradients = sum(p.nbytes for p in parameters if p.requires_grad)
    return Parts(
        weights=weights,
        gradients=gradients,
        optimizer=gradients * STATE_COPIES[optimizer],
        blocks=tuple(kept.blocks.values()),
        around=kept.around,
        boundary=kept.boundary,
        outputs=kept.outputs,
        logits=kept.logits,
        largest=max((p.nbytes for p in parameters), default=0),
        rows=rows,
    )
