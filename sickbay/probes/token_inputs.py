"""What a module's call holds: its inputs of token ids, the logits it answers with, and its arguments by the names `forward` gives them."""

from __future__ import annotations

import inspect
import re
import weakref
from typing import Any

import torch
from torch import Tensor, nn

from sickbay.patient import ForwardCall, bare, tensors_in

_NO_TOKENS = re.compile(r"mask|pos|type|segment|cache|past|len|bias|step|offset", re.IGNORECASE)
_INTEGERS = (torch.int64, torch.int32)


def arguments(call: ForwardCall) -> dict[str, Any]:
    """The call's arguments by parameter name, None left out; positions stand for names that `forward` does not give."""
    names = _positional(type(bare(call.module)))
    named = {names[place] if place < len(names) else f"*{place - len(names)}": value for place, value in enumerate(call.args)}
    return {name: value for name, value in (*named.items(), *call.kwargs.items()) if value is not None}


def _positional(kind: type[nn.Module]) -> tuple[str, ...]:
    """Names of what `kind.forward` takes by position, `self` left out."""
    by_position = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)
    return tuple(parameter.name for parameter in _taken(kind) if parameter.kind in by_position)


_known: weakref.WeakKeyDictionary[type[nn.Module], tuple[inspect.Parameter, ...]] = weakref.WeakKeyDictionary()


def _taken(kind: type[nn.Module]) -> tuple[inspect.Parameter, ...]:
    """What `kind.forward` takes, `self` left out, nothing where it cannot be asked; asked once of a class, as every call needs it."""
    taken = _known.get(kind)
    if taken is None:
        try:
            taken = tuple(inspect.signature(kind.forward).parameters.values())[1:]
        except (TypeError, ValueError):
            taken = ()
        _known[kind] = taken
    return taken


def has_ids(call: ForwardCall) -> bool:
    """True if an argument may be token ids; costs a look at each argument."""
    return any(_may_be_ids(value) for value in call.args) or any(_may_be_ids(value) for value in call.kwargs.values())


def token_inputs(call: ForwardCall) -> dict[str, Tensor]:
    """The arguments that may be token ids, one or two axes of integers, by name: masks, positions and types are left out."""
    named = arguments(call)
    return {name: value for name, value in named.items() if _may_be_ids(value) and not _NO_TOKENS.search(name)}


def _may_be_ids(value: Any) -> bool:
    return isinstance(value, Tensor) and value.dtype in _INTEGERS and 1 <= value.dim() <= 2 and value.numel() > 0


def logits_in(output: Any, classes: int, rows: int) -> Tensor | None:
    """The first floating-point tensor of `output` with `classes` numbers (0 = any) for each of `rows` rows, two or three axes."""
    for _, leaf in tensors_in(output):
        if not leaf.is_floating_point() or leaf.dim() not in (2, 3) or (classes and leaf.shape[-1] != classes):
            continue
        if leaf.shape[-1] > 1 and (rows in leaf.shape[:-1] or rows == 1):
            return leaf
    return None


def at_position(logits: Tensor, rows: int, position: int, time_first: bool) -> Tensor | None:
    """`(rows, V)`: what `logits` say of the token after `position` (counted from the end: -1 is the last), detached; None if unclear."""
    logits = logits.detach()
    if logits.dim() == 2:  # a row each, or the positions of one row
        return logits if len(logits) == rows and (rows > 1 or position == -1) else logits[position][None] if rows == 1 else None
    if time_first:
        logits = logits.transpose(0, 1)
    if logits.shape[0] != rows or logits.shape[1] < -position:
        return None
    return logits[:, position]


def forward_parameters(module: nn.Module) -> set[str]:
    """The names that `module`'s forward takes; empty where it cannot be asked."""
    return {parameter.name for parameter in _taken(type(bare(module)))}
