"""One forward again with the processor seconds of every operation, for use inside a forked copy: loops, copies, products written out.

Seconds are the process's own, so that what else the machine does is not counted; all comparisons are made in the same copy.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from types import FrameType
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from sickbay.exams.trace import ModulePath, conditions_of
from sickbay.patient import OWN_FOLDER, ForwardCall, bare, is_user_file, tensors_in, user_line

_MOST_BYTES = 1 << 30  # results held while the dataflow is followed
_MOST_OPERATIONS = 60_000
_PASSED_ON_BY = ("/torch/_tensor.py", "/torch/functional.py", "/torch/nn/functional.py", "/torch/_ops.py", "/torch/overrides.py")
_VIEWS = frozenset(
    [
        "view",
        "_unsafe_view",
        "select",
        "slice",
        "transpose",
        "permute",
        "expand",
        "unsqueeze",
        "squeeze",
        "t",
        "detach",
        "alias",
        "as_strided",
        "unbind",
        "split",
        "unfold",
        "diagonal",
    ]
)


@dataclass(eq=False)
class Timed:
    """One aten operation: processor `seconds`, the user's `line`, the storages it read, made and wrote into.

    `own`: the user's code asked for it, not a library that the line calls.
    """

    name: str
    function: Any
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    result: Any
    seconds: float
    line: str
    module: str
    reads: tuple[int, ...]
    makes: tuple[int, ...]
    own: bool = True

    @property
    def view(self) -> bool:
        return self.name in _VIEWS


@dataclass
class Profile:
    """The operations of one forward in order. `leaves`: storages of the parameters. `complete`: False where there were too many."""

    operations: list[Timed] = field(default_factory=list)
    leaves: frozenset[int] = frozenset()
    complete: bool = True

    @property
    def seconds(self) -> float:
        return sum(operation.seconds for operation in self.operations)


class Profiler(TorchDispatchMode):
    """Times every operation and keeps its results, so that storages stay distinct."""

    def __init__(self, path: ModulePath) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.profile, self._path, self._bytes = Profile(), path, 0

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        return False

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        began = time.process_time()
        result = func(*args, **kwargs)
        seconds = time.process_time() - began
        operations = self.profile.operations
        if len(operations) >= _MOST_OPERATIONS or self._bytes > _MOST_BYTES:
            self.profile.complete = False
            return result
        makes = tuple(_storage(tensor) for _, tensor in tensors_in(result))
        reads = tuple(_storage(tensor) for _, tensor in tensors_in((args, kwargs)))
        self._bytes += sum(tensor.nbytes for _, tensor in tensors_in(result) if _storage(tensor) not in reads)
        name = func._schema.name.split("::")[-1]
        line, own = user_line(2), asked_by_user()
        operations.append(Timed(name, func, args, kwargs, result, seconds, line, self._path.current, reads, makes, own))
        return result


def asked_by_user() -> bool:
    """True where the innermost frame is the user's, apart from ours and torch's plain functions and methods."""
    frame: FrameType | None = sys._getframe(1)
    while frame is not None:
        name = frame.f_code.co_filename
        if is_user_file(name):
            return True
        if not name.startswith(OWN_FOLDER) and not name.endswith(_PASSED_ON_BY) and "/torch/utils/" not in name:
            return False
        frame = frame.f_back
    return False


def _storage(tensor: Tensor) -> int:
    return int(tensor.untyped_storage()._cdata)


def profile(call: ForwardCall) -> Profile:
    """`call` run again, every operation timed."""
    module = bare(call.module)
    with conditions_of(call), ModulePath(module) as path:
        profiler = Profiler(path)
        with profiler:
            module(*call.args, **call.kwargs)
    profiler.profile.leaves = frozenset(_storage(parameter) for parameter in module.parameters())
    return profiler.profile


def pass_seconds(call: ForwardCall, args: Any, kwargs: Any, most: float, times: int = 3) -> float:
    """Least processor seconds of a forward with `args` and its backward from the sum of the outputs, within about `most` seconds."""
    best, began = float("inf"), time.process_time()
    for _ in range(times):
        started = time.process_time()
        with conditions_of(call):
            total_of(bare(call.module)(*args, **kwargs)).backward()
        best = min(best, time.process_time() - started)
        if time.process_time() - began > most:
            break
    return best


def forward_seconds(call: ForwardCall) -> float:
    """Least processor seconds of two forwards alone."""

    def forward() -> None:
        with conditions_of(call):
            bare(call.module)(*call.args, **call.kwargs)

    return least(forward, 1.0, times=2)


def total_of(output: Any) -> Tensor:
    """The sum of all outputs that have a gradient. Raises ValueError where none has."""
    parts = [
        tensor.float().sum() if tensor.dtype != torch.float64 else tensor.sum() for _, tensor in tensors_in(output) if tensor.requires_grad
    ]
    if not parts:
        raise ValueError("no output of the model has a gradient")
    return torch.stack([part.double() for part in parts]).sum()


def least(question: Callable[[], Any], most: float, times: int = 5) -> float:
    """Least processor seconds of `question()` over `times` calls, fewer where they take more than `most` seconds together."""
    best, began = float("inf"), time.process_time()
    for _ in range(times):
        started = time.process_time()
        question()
        best = min(best, time.process_time() - started)
        if time.process_time() - began > most:
            break
    return best


def levels(operations: Iterable[Timed]) -> dict[int, int]:
    """How many operations each one waits for, one after the other, by `id`: calls of one loop share a level unless it is sequential."""
    chain: dict[int, int] = {}
    found: dict[int, int] = {}
    for operation in operations:
        before = max((chain.get(storage, 0) for storage in operation.reads), default=0)
        writes = operation.name.endswith("_")
        alias = not writes and set(operation.makes) <= set(operation.reads)
        here = found[id(operation)] = before if alias else before + 1
        for storage in (*operation.makes, *operation.reads[:1]) if writes else operation.makes:
            chain[storage] = max(chain.get(storage, 0), here)
    return found
