"""What is to be checked: a model, some of its batches, its loss and optimizer, however the user hands them over."""

from __future__ import annotations

import difflib
import importlib
import importlib.util
import inspect
import os
import sys
import traceback
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from torch import Tensor, nn

from sickbay.checklist.isolation import randomness_kept
from sickbay.core.errors import UsageError
from sickbay.patient import is_user_file, mapped

MOST_BATCHES = 24  # taken from the iterator; steps of the watched training
MOST_BYTES = 256 << 20  # of all batches taken
_NAMES = {
    "model": ("model", "net", "module", "network"),
    "batches": ("batches", "batch_iterator", "data", "loader", "dataloader", "train_loader", "train_dataloader", "train_batches"),
    "loss": ("loss", "loss_fn", "loss_function", "criterion"),
    "optimizer": ("optimizer", "optim", "opt"),
}
_WANTED = "it must give (model, batches, loss) or (model, batches, loss, optimizer): a tuple, a dict or an object with these names"


@dataclass
class Target:
    """What the exams ask. `batches`: at most 24, taken once; `loss`: None = the model's own; `make`: builds a fresh one, if known."""

    name: str
    model: nn.Module
    batches: list[Any]
    loss: Callable[..., Any] | None = None
    optimizer: torch.optim.Optimizer | None = None
    make: Callable[..., Any] | None = None
    facts: dict[str, Any] = field(default_factory=dict)

    @property
    def device(self) -> torch.device:
        return next(self.model.parameters()).device


def of_value(value: Any, name: str, make: Callable[..., Any] | None = None) -> Target:
    """The target that `value` describes: a tuple, dict or object. Raises UsageError saying what was received."""
    parts = _parts(value, name)
    return of_parts(parts.get("model"), parts.get("batches"), parts.get("loss"), parts.get("optimizer"), name, make)


def of_parts(
    model: Any, batches: Any, loss: Any = None, optimizer: Any = None, name: str = "model", make: Callable[..., Any] | None = None
) -> Target:
    """The target of these parts, with batches taken from `batches`. Raises UsageError for any part that is of the wrong kind."""
    if isinstance(model, type) and issubclass(model, nn.Module):
        raise UsageError(f"{name}: the model is the class {model.__name__}: give an instance of it")
    if not isinstance(model, nn.Module):
        raise UsageError(f"{name}: the model is of type {type(model).__name__}: it must be a torch.nn.Module")
    on_meta = [key for key, parameter in model.named_parameters() if parameter.is_meta]
    if on_meta:
        raise UsageError(f"{name}: {on_meta[0]} is on the meta device and has no values: build the model on a real device")
    if not any(parameter.requires_grad for parameter in model.parameters()):
        raise UsageError(f"{name}: {type(model).__name__} has no trainable parameter: there is nothing that could be trained")
    if loss is not None and not callable(loss):
        raise UsageError(f"{name}: the loss is of type {type(loss).__name__}: it must be a function, or None for the model's own loss")
    if optimizer is not None and not isinstance(optimizer, torch.optim.Optimizer):
        raise UsageError(f"{name}: the optimizer is of type {type(optimizer).__name__}: it must be a torch.optim.Optimizer")
    return Target(name, model, take(batches, name), loss, optimizer, make)


def take(batches: Any, name: str) -> list[Any]:
    """At most 24 batches, at most 256 MB, as copies; the global random states are as before. Raises UsageError if there is none.

    An object that comes twice is one object in the list, too.
    """
    if batches is None or isinstance(batches, (str, bytes, Tensor, Mapping)):
        kind = "None" if batches is None else f"one {type(batches).__name__}"
        raise UsageError(f"{name}: the batches are {kind}: give an iterator or a list of batches (a single one: [batch])")
    taken: list[Any] = []
    copies: dict[int, tuple[Any, Any]] = {}
    size = 0
    with randomness_kept():
        try:
            source = batches() if callable(batches) and not isinstance(batches, Iterable) else batches
            for batch in _first(source):
                if id(batch) not in copies:
                    copies[id(batch)] = (batch, copied(batch))
                    size += sum(tensor.nbytes for tensor in tensors(batch))
                taken.append(copies[id(batch)][1])
                if size > MOST_BYTES:
                    break
        except Exception as problem:
            raise UsageError(f"{name}: the batches raised {_told(problem)}") from problem
    if not taken:
        raise UsageError(f"{name}: the batches are exhausted: not one came (was the generator used before?)")
    if next(tensors(taken[0]), None) is None:
        raise UsageError(f"{name}: a batch is of type {type(taken[0]).__name__} and holds no tensor: batches must be of tensors")
    return taken


def _first(source: Any) -> Iterator[Any]:
    if not isinstance(source, Iterable) and not hasattr(source, "__getitem__"):
        raise TypeError(f"{type(source).__name__} is not iterable")
    # Not islice: it would take one batch more than it gives.
    for number, batch in enumerate(source, 1):
        yield batch
        if number == MOST_BATCHES:
            return


def tensors(value: Any) -> Iterator[Tensor]:
    """The tensors in nested tuples, lists and mappings."""
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, Mapping):
        for item in value.values():
            yield from tensors(item)
    elif isinstance(value, (list, tuple)):
        for item in value:
            yield from tensors(item)


def copied(batch: Any) -> Any:
    """`batch` with its tensors cloned, so that a buffer that is filled anew cannot change it."""
    return mapped(batch, lambda tensor: tensor.detach().clone())


def _parts(value: Any, name: str) -> dict[str, Any]:
    if isinstance(value, nn.Module) or value is None:
        raise UsageError(f"{name} returned {'None' if value is None else 'a model alone'}: {_WANTED}")
    if isinstance(value, Mapping):
        found = {part: value[key] for part, keys in _NAMES.items() for key in reversed(keys) if key in value}
    elif isinstance(value, (tuple, list)) and not hasattr(value, "_fields"):
        if not 2 <= len(value) <= 4:
            raise UsageError(f"{name} returned {len(value)} value{'' if len(value) == 1 else 's'}: {_WANTED}")
        found = dict(zip(("model", "batches", "loss", "optimizer"), value))
    else:
        found = {part: getattr(value, key) for part, keys in _NAMES.items() for key in reversed(keys) if hasattr(value, key)}
    missing = [part for part in ("model", "batches") if part not in found]
    if missing:
        raise UsageError(f"{name} returned a {type(value).__name__} without {' and '.join(missing)}: {_WANTED}")
    return found


# --- by name -----------------------------------------------------------------------------------------------------------
def named(text: str) -> Target:
    """The target of `module:function` or `file.py:function`, its function called. Raises UsageError for whatever goes wrong."""
    place, _, attribute = text.rpartition(":")
    if not place or not attribute:
        raise UsageError(f"{text!r} names no function: write module:function or file.py:function")
    module = _module(place)
    value: Any = module
    for part in attribute.split("."):
        if not hasattr(value, part):
            functions = [name for name, thing in vars(module).items() if callable(thing) and not name.startswith("_")]
            near = difflib.get_close_matches(part, functions, n=1, cutoff=0.5)
            own = [name for name in functions if getattr(getattr(module, name), "__module__", "") == module.__name__]
            way_out = f"did you mean {near[0]}?" if near else f"it has {', '.join(own[:6])}" if own else "it defines no function"
            raise UsageError(f"{place} has no {part!r}: {way_out}")
        value = getattr(value, part)
    if not callable(value):
        return of_value(value, text)
    _refuse_arguments(value, text)
    try:
        made = value()
    except Exception as problem:
        raise UsageError(f"{text} raised {_told(problem)}") from problem
    return of_value(made, text, make=value)


def _module(place: str) -> ModuleType:
    path = Path(place)
    if place.endswith(".py"):
        if not path.is_file():
            raise UsageError(f"there is no file {place} in {os.getcwd()}: check the path")
        sys.path.insert(0, str(path.resolve().parent))
        name = path.stem
        spec = importlib.util.spec_from_file_location(name, path.resolve())
        assert spec is not None and spec.loader is not None
        module = importlib.util.module_from_spec(spec)
        sys.modules[name] = module
        try:
            spec.loader.exec_module(module)
        except (Exception, SystemExit) as problem:
            raise UsageError(f"{place} raised {_told(problem)} while it was imported") from problem
        return module
    if os.getcwd() not in sys.path:
        sys.path.insert(0, os.getcwd())
    try:
        return importlib.import_module(place)
    except ModuleNotFoundError as problem:
        if problem.name and (place == problem.name or place.startswith(problem.name + ".")):
            hint = f" (for the file: {place}.py:...)" if Path(f"{place}.py").is_file() else ""
            raise UsageError(f"there is no module {place!r}: run from the folder that holds it, or install it{hint}") from None
        raise UsageError(f"{place} raised {_told(problem)} while it was imported") from problem
    except (Exception, SystemExit) as problem:
        raise UsageError(f"{place} raised {_told(problem)} while it was imported") from problem


def _refuse_arguments(function: Any, text: str) -> None:
    try:
        parameters = inspect.signature(function).parameters.values()
    except (TypeError, ValueError):
        return
    needed = [p.name for p in parameters if p.default is p.empty and p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY)]
    if needed:
        raise UsageError(f"{text} needs the arguments {', '.join(needed)}: name a function that can be called without any")


def _told(problem: BaseException) -> str:
    """The exception in a line, with the innermost line of the user's."""
    frames = [(frame.f_code.co_filename, line) for frame, line in traceback.walk_tb(problem.__traceback__)]
    line = next((f" ({os.path.relpath(name)}:{at})" for name, at in reversed(frames) if is_user_file(name)), "")
    text = " ".join(str(problem).split())
    return f"{type(problem).__name__}{': ' + text if text else ''}{line}"
