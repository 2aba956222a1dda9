"""Tensors in safetensors files, whole or dealt out: each process writes what it holds, and reads what it needs of what others wrote.

    model.safetensors                                     one process, or what every process holds alike
    model-00001-of-00002.safetensors, ...-00002-of-...    what each process holds
    model.index.json                                      where the parts of each tensor are, if they are in several files

Letters behind names would say nothing here: every shape occurs.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from types import TracebackType
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from sickbay.reference.processes.dtensor import dealt_axis, local
from sickbay.reference.processes.world import World
from sickbay.reference.saving.durable import as_os_error

Order = Callable[[str], "Sequence[int] | None"]
Box = tuple[tuple[int, ...], Tensor]


def boxes(tensor: Tensor, world: World, order: Sequence[int] | None = None) -> list[Box]:
    """What of `tensor` this process holds: (place of a box's first element in the whole tensor, view of the box's values).

    `order`: the rows of the whole tensor as the processes hold them, None = from the first to the last.
    """
    axis, here = dealt_axis(tensor), local(tensor).detach()
    if axis is None:
        return [((0,) * tensor.dim(), here)]
    length = tensor.shape[axis]
    first = min(world.rank * math.ceil(length / world.size), length)  # dealt as torch.chunk deals
    corner = [0] * tensor.dim()
    corner[axis] = first
    if not here.numel():
        return []
    if order is None or axis:
        return [(tuple(corner), here)]
    rows, found, begin = order[first : first + len(here)], [], 0
    for end in range(1, len(rows) + 1):
        if end == len(rows) or rows[end] != rows[end - 1] + 1:
            found.append(((rows[begin], *corner[1:]), here[begin:end]))
            begin = end
    return found


def write(folder: Path, kind: str, tensors: Mapping[str, Tensor], world: World, order: Order) -> None:
    """`folder` holds what this process has of `tensors`, what all hold alike written by the first. Raises OSError."""
    dealt = any(dealt_axis(tensor) is not None for tensor in tensors.values())
    if not dealt and not world.first:
        return
    file = folder / (f"{kind}-{world.rank + 1:05d}-of-{world.size:05d}.safetensors" if dealt else f"{kind}.safetensors")
    if not dealt:
        whole = {name: local(tensor).detach().contiguous() for name, tensor in tensors.items()}
        as_os_error(lambda: save_file(whole, file), file)
        return
    values: dict[str, Tensor] = {}
    places: dict[str, Any] = {}
    for name, tensor in tensors.items():
        if dealt_axis(tensor) is None and not world.first:
            continue
        for corner, view in boxes(tensor, world, order(name)):
            key = f"{name}@{','.join(map(str, corner))}"
            values[key] = view.clone(memory_format=torch.contiguous_format)  # views of one tensor would share memory
            places[key] = {"name": name, "whole": list(tensor.shape), "corner": list(corner)}
    as_os_error(lambda: save_file(values, file, metadata={"places": json.dumps(places)}), file)


def write_index(folder: Path, kind: str) -> None:
    """The index of the files that all processes have written is in `folder`."""
    index: dict[str, Any] = {}
    for file in sorted(folder.glob(f"{kind}-*-of-*.safetensors")):
        with safe_open(file, framework="pt") as opened:
            for key, place in json.loads(opened.metadata()["places"]).items():
                entry = index.setdefault(place["name"], {"shape": place["whole"], "parts": []})
                entry["parts"].append({"file": file.name, "key": key, "corner": place["corner"]})
    if index:
        (folder / f"{kind}.index.json").write_text(json.dumps(index, indent=1) + "\n", encoding="utf-8")


class Stored:
    """The tensors `kind` of a checkpoint's folder, read as they are asked for, by any number of processes. Use it in a `with`."""

    def __init__(self, folder: Path, kind: str) -> None:
        self._files, self._folder = ExitStack(), folder
        self._opened: dict[str, Any] = {}
        listed = folder / f"{kind}.index.json"
        self._index: dict[str, Any]
        if listed.is_file():
            self._index = json.loads(listed.read_text(encoding="utf-8"))
        else:
            file = self._open(f"{kind}.safetensors")
            self._index = {
                name: {
                    "shape": (shape := file.get_slice(name).get_shape()),
                    "parts": [{"file": f"{kind}.safetensors", "key": name, "corner": [0] * len(shape)}],
                }
                for name in file.keys()  # noqa: SIM118 - the opened file is no dict
            }

    def __enter__(self) -> Stored:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._files.close()

    def names(self) -> list[str]:
        return sorted(self._index)

    def shape(self, name: str) -> tuple[int, ...]:
        """Of the whole tensor."""
        return tuple(self._index[name]["shape"])

    def whole(self, name: str) -> Tensor:
        """The whole tensor, on the CPU, in the type it was saved in."""
        first = self._index[name]["parts"][0]
        values = torch.empty(self.shape(name), dtype=self._open(first["file"]).get_tensor(first["key"]).dtype)
        self._fill(name, ((0,) * values.dim(), values))
        return values

    def read_into(self, name: str, target: Tensor, world: World, order: Sequence[int] | None = None) -> None:
        """What `target` holds here of the whole has the saved values. Raises ValueError where shapes differ."""
        if self.shape(name) != tuple(target.shape):
            raise ValueError(f"{name} has shape {self.shape(name)} in the checkpoint and {tuple(target.shape)} in the model")
        for box in boxes(target, world, order):
            self._fill(name, box)

    def _fill(self, name: str, box: Box) -> None:
        corner, target = box
        filled = 0
        for part in self._index[name]["parts"]:
            saved = self._open(part["file"]).get_slice(part["key"])
            starts = [max(a, b) for a, b in zip(corner, part["corner"])]
            ends = [min(a + n, b + m) for a, n, b, m in zip(corner, target.shape, part["corner"], saved.get_shape())]
            if any(end <= start for start, end in zip(starts, ends)):
                continue
            there = tuple(slice(start - b, end - b) for start, end, b in zip(starts, ends, part["corner"]))
            here = tuple(slice(start - a, end - a) for start, end, a in zip(starts, ends, corner))
            # A slice of a tensor without axes is not a thing that safetensors knows.
            values = saved[there] if there else self._open(part["file"]).get_tensor(part["key"])
            target[here].copy_(values)
            filled += values.numel()
        if filled != target.numel():
            raise ValueError(f"{name}: the checkpoint's files hold {filled} of the {target.numel()} values that are needed")

    def _open(self, name: str) -> Any:
        if name not in self._opened:
            self._opened[name] = self._files.enter_context(safe_open(self._folder / name, framework="pt"))
        return self._opened[name]
