"""Walks down from a script's variables to the tensors they reach, noting the path to each: `self.history[17]`, `cache['k']`.

No code of the script's runs on the way: only built-in containers, instance dictionaries, closures and frames are opened.
"""

from __future__ import annotations

import functools
import sys
import time
import types
from collections import deque
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from sickbay.patient import is_user_file

MAX_OBJECTS = 300_000
SECONDS = 3.0
_LONG = 4096  # elements of a container that are opened from each of its ends
_ATOMIC = (str, bytes, int, float, bool, complex, type(None), torch.dtype, torch.device, torch.Size, range, slice)
_CLOSED = (types.ModuleType, type, types.BuiltinFunctionType, types.CodeType, torch.UntypedStorage, torch.Generator)
_OWN_LOOPS = ("transformers", "lightning", "pytorch_lightning", "accelerate", "fabric", "ignite", "trl", "peft")

Path = tuple[str, ...]


@dataclass(frozen=True)
class Found:
    """A tensor and where it hangs. `path`: steps from the variable on; `file`, `function`: of the frame that has the variable."""

    tensor: Tensor
    path: Path
    file: str
    function: str


@dataclass(frozen=True)
class Container:
    """A container that directly, or within its elements, holds tensors. `bounded`: it drops old elements by itself."""

    path: Path
    file: str
    function: str
    kind: str
    bounded: bool


def text_of(path: Path) -> str:
    """The path as a person writes it."""
    return "".join(path)


class Reach:
    """All tensors in reach of the frames from `frame` outwards, nearest first. `containers`: by path."""

    def __init__(self, frame: types.FrameType | None, extra: Iterable[tuple[str, Any]] = ()) -> None:
        self.found: list[Found] = []
        self.containers: dict[Path, Container] = {}
        self._seen: set[int] = set()
        self._keep: list[Any] = []  # an id is only good while its object lives
        self._until = time.monotonic() + SECONDS
        frames = list(_frames(frame))
        mine = [f for f in frames if is_user_file(f.f_code.co_filename)]
        rest = [f for f in frames if f not in mine and f.f_globals.get("__name__", "").partition(".")[0] in _OWN_LOOPS]
        queue: deque[tuple[Any, Path, str, str]] = deque()
        for one in (*mine, *rest):
            code = one.f_code
            for name, value in dict(one.f_locals).items():
                queue.append((value, (name,), code.co_filename, code.co_name))
        for module in _user_modules(mine):
            for name, value in list(vars(module).items()):
                if not name.startswith("__"):
                    queue.append((value, (name,), getattr(module, "__file__", "") or "", ""))
        for name, value in extra:
            queue.append((value, (name,), "", ""))
        self._walk(queue)

    def _walk(self, queue: deque[tuple[Any, Path, str, str]]) -> None:
        while queue and len(self._seen) < MAX_OBJECTS:
            value, path, file, function = queue.popleft()
            if isinstance(value, _ATOMIC) or id(value) in self._seen:
                continue
            if len(self._seen) % 1024 == 0 and time.monotonic() > self._until:
                return
            self._seen.add(id(value))
            self._keep.append(value)
            if isinstance(value, Tensor):
                self.found.append(Found(value, path, file, function))
                continue
            if isinstance(value, _CLOSED) and not _is_user_class(value):
                continue
            if isinstance(value, (list, dict, deque, set, tuple)):
                bounded = isinstance(value, deque) and value.maxlen is not None
                self.containers[path] = Container(path, file, function, type(value).__name__, bounded)
            elif _is_dataset(value):
                self.containers[path] = Container(path, file, function, type(value).__name__, True)
            queue.extend((inner, (*path, step), file, function) for step, inner in _inside(value))


def _inside(value: Any) -> Iterator[tuple[str, Any]]:
    """What `value` holds, each with the step that leads to it."""
    if isinstance(value, dict):
        items = list(dict.items(value))
        for key, inner in _ends(items):
            if not isinstance(inner, _ATOMIC):
                yield f"[{key!r}]" if type(key) in (str, int, float, bool) else "[...]", inner
    elif isinstance(value, (list, tuple, deque, set, frozenset)):
        size = len(value)
        elements = list(value) if not isinstance(value, list) else value
        if size > _LONG and all(isinstance(elements[i], _ATOMIC) for i in (0, size // 2, size - 1)):
            return
        names = getattr(type(value), "_fields", ()) if isinstance(value, tuple) else ()
        for index, inner in _ends(list(enumerate(elements))):
            if not isinstance(inner, _ATOMIC):
                yield (f".{names[index]}" if index < len(names) else f"[{index}]"), inner
    elif isinstance(value, types.FunctionType):
        for name, cell in zip(value.__code__.co_freevars, value.__closure__ or ()):
            try:
                yield f".<{name}>", cell.cell_contents
            except ValueError:  # not assigned yet
                continue
        for number, inner in enumerate(value.__defaults__ or ()):
            yield f".<default {number}>", inner
    elif isinstance(value, types.MethodType):
        yield ".__self__", value.__self__
    elif isinstance(value, functools.partial):
        yield ".args", value.args
        yield ".keywords", value.keywords
        yield ".func", value.func
    elif isinstance(value, types.GeneratorType):
        if value.gi_frame is not None:
            yield from ((f".{name}", inner) for name, inner in dict(value.gi_frame.f_locals).items())
    elif isinstance(value, types.CellType):
        return
    if not isinstance(value, (list, tuple, set, frozenset, dict, deque)) or type(value).__module__ not in ("builtins", "collections"):
        yield from _attributes(value)


def _attributes(value: Any) -> Iterator[tuple[str, Any]]:
    try:
        own = object.__getattribute__(value, "__dict__") if not isinstance(value, type) else dict(type.__getattribute__(value, "__dict__"))
    except Exception:
        own = {}
    if isinstance(own, (dict, types.MappingProxyType)):
        for name, inner in list(own.items()):
            if isinstance(inner, _ATOMIC) or (isinstance(value, type) and isinstance(inner, (property, staticmethod, classmethod))):
                continue
            yield f".{name}", inner
    for kind in type(value).__mro__[:-1] if not isinstance(value, type) else ():
        for name, slot in vars(kind).items():
            if isinstance(slot, types.MemberDescriptorType):
                try:
                    yield f".{name}", slot.__get__(value)
                except Exception:  # an empty slot
                    continue


def _ends(items: list[Any]) -> list[Any]:
    return items if len(items) <= 2 * _LONG else items[:_LONG] + items[-_LONG:]


def _frames(frame: types.FrameType | None) -> Iterator[types.FrameType]:
    while frame is not None:
        yield frame
        frame = frame.f_back


def _user_modules(frames: list[types.FrameType]) -> list[types.ModuleType]:
    """The modules whose files are the user's, the running script first."""
    running = {f.f_code.co_filename for f in frames}
    modules = [
        module
        for name, module in list(sys.modules.items())
        if isinstance(module, types.ModuleType) and isinstance(getattr(module, "__file__", None), str) and _is_users(name, module)
    ]
    return sorted(modules, key=lambda module: module.__file__ not in running)


def _is_users(name: str, module: types.ModuleType) -> bool:
    return (
        not name.startswith("sickbay")
        and bool(module.__file__)
        and str(module.__file__).endswith(".py")
        and is_user_file(str(module.__file__))
    )


def _is_user_class(value: Any) -> bool:
    if not isinstance(value, type):
        return False
    module = sys.modules.get(value.__module__)
    return module is not None and isinstance(getattr(module, "__file__", None), str) and _is_users(value.__module__, module)


def _is_dataset(value: Any) -> bool:
    from torch.utils.data import Dataset

    return isinstance(value, Dataset)
