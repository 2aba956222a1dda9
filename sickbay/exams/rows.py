"""Whether rows of a batch of numbers (time series, images, features) influence one another, found by changing every second row."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from sickbay.exams.influences import even_rows
from sickbay.exams.perturbation import NOISE
from sickbay.exams.sequences import Observation, Rerun, float_leaves, time_axis
from sickbay.patient import ForwardCall, bare, mapped, user_line

_NUMBERS = 1024  # of a row that are compared


class Influence(NamedTuple):
    """Change of the other rows over that of the changed rows. `where`: the module in which that is so, "" = the outputs of all."""

    value: float
    rows: int
    where: str = ""
    source: str = ""


def row_influence(again: Rerun, seen: Observation) -> Influence | str:
    """What rows do to the outputs of others; where no output depends on the inputs, inside the model. Or why that cannot be told."""
    call = again.call
    source = next((tensor for _, tensor in again.arguments if tensor.is_floating_point() and tensor.dim() >= 2), None)
    leaf = next((index for index, tensor in enumerate(float_leaves(seen.output)) if tensor.dim() >= 1), None)
    if call is None or source is None or leaf is None:
        return "the forward takes no batch of numbers, or gives none"
    where = _batch_axes(tuple(source.shape), tuple(float_leaves(seen.output)[leaf].shape), seen)
    if where is None:
        return "the batch axis could not be told from the time axis"
    axis, answer_axis = where
    rows = source.shape[axis]
    if rows < 2:
        return "batches of one row only"
    even = even_rows(rows)[:, 0]
    generator = torch.Generator().manual_seed(0)
    moved = source.detach().movedim(axis, 0).clone()
    moved[even] = (
        moved.flip(0)[even] + torch.randn(moved[even].shape, generator=generator, dtype=torch.float32).to(moved.dtype) * moved.std()
    )
    changed = dataclasses.replace(
        call, args=_replaced(call.args, source, moved.movedim(0, axis)), kwargs=_replaced(call.kwargs, source, moved.movedim(0, axis))
    )
    before, repeated = (_answers(again, leaf, answer_axis) for _ in range(2))
    again.call = changed
    after = _answers(again, leaf, answer_axis)
    again.call = call
    own, others = _moved(before[even], after[even]), _moved(before[~even], after[~even])
    if _moved(before, repeated) > NOISE * float(torch.nan_to_num(before).abs().max()):
        return "the forward pass does not repeat exactly"
    if own > 0:
        return Influence(others / own, rows)
    return _inside(again, changed, axis, even) or "no output moves when the inputs are changed"


def _inside(again: Rerun, changed: ForwardCall, axis: int, even: Tensor) -> Influence | None:
    """The first module in which rows move others, where the readout hides it (attention over rows, read at a token they all share)."""
    call, rows = again.call, len(even)
    assert call is not None
    with _parts(call.module, axis, rows) as before:
        again()
    again.call = changed
    with _parts(call.module, axis, rows) as after:
        again()
    again.call = call
    for one, other in zip(before, after):
        if one.name != other.name or one.output.shape != other.output.shape:
            return None
        own, others = _moved(one.output[even], other.output[even]), _moved(one.output[~even], other.output[~even])
        if own > 0 and others > NOISE * float(torch.nan_to_num(one.output).abs().max()):
            return Influence(others / own, rows, one.name, one.source)
    return None


class Part(NamedTuple):
    """One call of a module. `output`: some of the numbers it gave for each row, `(rows, numbers)`."""

    name: str
    output: Tensor
    source: str


@contextlib.contextmanager
def _parts(module: nn.Module, axis: int, rows: int) -> Iterator[list[Part]]:
    """Collects what the modules give whose output has one axis as long as the batch, where the batch was."""
    found: list[Part] = []
    handles = []

    def hook(name: str) -> Callable[..., None]:
        def note(part: nn.Module, args: Any, output: Any) -> None:
            for leaf in float_leaves(output)[:1]:
                if leaf.dim() > max(axis, 1) and leaf.shape[axis] == rows and list(leaf.shape).count(rows) == 1:
                    numbers = leaf.detach().movedim(axis, 0).flatten(1)
                    found.append(Part(name, numbers[:, :: max(1, -(-numbers.shape[1] // _NUMBERS))].double(), user_line()))

        return note

    for name, part in bare(module).named_modules():
        handles.append(part.register_forward_hook(hook(name)))
    try:
        yield found
    finally:
        for handle in handles:
            handle.remove()


def _answers(again: Rerun, leaf: int, axis: int) -> Tensor:
    return float_leaves(again())[leaf].detach().double().movedim(axis, 0)


def _moved(before: Tensor, after: Tensor) -> float:
    difference = torch.nan_to_num(after - before, 0.0, 0.0, 0.0).abs()
    return float(difference.max()) if difference.numel() else 0.0


def _batch_axes(given: tuple[int, ...], gave: tuple[int, ...], seen: Observation) -> tuple[int, int] | None:
    """The batch's axis of the input and of the output: the one that the output keeps; by positions where it keeps two."""
    if len(given) != 3:
        return (0, 0) if gave[0] == given[0] else None
    first, second = given[:2]
    if len(gave) >= 2 and gave[:2] in ((first, second), (second, first)) and len(gave) == 3:
        time = time_axis(seen, (first, second))
        return None if time is None or first == second else (1 - time, gave.index(given[1 - time]))
    if gave[0] == first != second:
        return 0, 0
    return (1, 0) if gave[0] == second != first else None


def _replaced(value: Any, old: Tensor, new: Tensor) -> Any:
    return mapped(value, lambda tensor: new if tensor is old else tensor)
