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
    """The call's arguments by parameter name, None left out; positions stand for names where `forward` cannot be asked."""
    try:
        bound = _signature(type(bare(call.module))).bind(None, *call.args, **call.kwargs)
    except (TypeError, ValueError):
        return {**{str(place): value for place, value in enumerate(call.args)}, **call.kwargs}
    found: dict[str, Any] = {}
    for name, value in list(bound.arguments.items())[1:]:
        kind = bound.signature.parameters[name].kind
        if kind is inspect.Parameter.VAR_KEYWORD:
            found.update(value)
        elif kind is inspect.Parameter.VAR_POSITIONAL:
            found.update({f"*{place}": each for place, each in enumerate(value)})
        else:
            found[name] = value
    return {name: value for name, value in found.items() if value is not None}


_signatures: weakref.WeakKeyDictionary[type[nn.Module], inspect.Signature] = weakref.WeakKeyDictionary()


def _signature(kind: type[nn.Module]) -> inspect.Signature:
    known = _signatures.get(kind)
    if known is None:
        known = _signatures[kind] = inspect.signature(kind.forward)
    return known


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
    try:
        return set(list(_signature(type(bare(module))).parameters)[1:])
    except (TypeError, ValueError):
        return set()
