"""What the watched torch calls were given, looked at without using any of it up."""

from __future__ import annotations

from collections.abc import Generator, Iterator
from typing import Any

import torch
from torch import Tensor


def first_tensor(tensors: Any) -> Tensor | None:
    """The tensor that a backward begins with; None if it is something else."""
    first = tensors[0] if isinstance(tensors, (tuple, list)) and tensors else tensors
    return first if isinstance(first, Tensor) else None


def noting(parameters: Generator[Any, Any, Any], given: list[Any]) -> Iterator[Any]:
    """A generator of the same, which leaves in `given` what it gave."""
    for parameter in parameters:
        given.append(parameter)
        yield parameter


def closure_of(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """The closure that an optimizer's step was given, or None. `args` begin with the optimizer itself."""
    if len(args) < 2 and not kwargs:
        return None
    return kwargs.get("closure") or next((a for a in args if callable(a) and not isinstance(a, torch.optim.Optimizer)), None)


def clip_arguments(args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, Any, tuple[Any, ...]]:
    """(parameters, max_norm, the other positional ones) of a clip_grad_norm_ that was given both; they are taken out of `kwargs`."""
    given = [*args[:2]]
    given += [kwargs.pop(name) for name in ("parameters", "max_norm")[len(given) :]]
    return given[0], given[1], args[2:]
