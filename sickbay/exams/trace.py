"""Run a forward again inside a forked copy and see every operation: its operands, results, module and the user's line."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from sickbay.patient import ForwardCall, autocast_of, bare, user_line

Intercept = Callable[["Operation", Any], Any]


@dataclass
class Operation:
    """One aten operation: `name` without overload ("div"), `module` path, the user's `source`; `inputs` and `outputs` are live tensors."""

    index: int
    name: str
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    module: str
    source: str
    outputs: list[Tensor] = field(default_factory=list)

    @property
    def inputs(self) -> list[Tensor]:
        flat: list[Tensor] = []
        for value in (*self.args, *self.kwargs.values()):
            if isinstance(value, Tensor):
                flat.append(value)
            elif isinstance(value, (list, tuple)):
                flat.extend(item for item in value if isinstance(item, Tensor))
        return flat

    @property
    def scalars(self) -> list[float]:
        return [float(v) for v in (*self.args, *self.kwargs.values()) if isinstance(v, (int, float)) and not isinstance(v, bool)]


class ModulePath:
    """Knows which module of `root` is running, by hooks that live only inside the forked copy."""

    def __init__(self, root: nn.Module) -> None:
        self._names = {id(module): name for name, module in root.named_modules()}
        self.stack: list[str] = []

    def __enter__(self) -> ModulePath:
        self._handles = [
            nn.modules.module.register_module_forward_pre_hook(self._enter),
            nn.modules.module.register_module_forward_hook(self._leave, always_call=True),
        ]
        return self

    def __exit__(self, *_: object) -> None:
        for handle in self._handles:
            handle.remove()

    def _enter(self, module: nn.Module, _: Any) -> None:
        self.stack.append(self._names.get(id(module), type(module).__name__))

    def _leave(self, *_: Any) -> None:
        if self.stack:
            self.stack.pop()

    @property
    def current(self) -> str:
        return self.stack[-1] if self.stack else ""


class Tracer(TorchDispatchMode):
    """Records operations; `intercept(operation, result)` may replace a result (to perturb) or raise `Stop` to end the run.

    `keep` holds on to every tensor so that identities stay unique and dataflow can be followed.
    """

    def __init__(self, path: ModulePath, intercept: Intercept | None = None, keep: bool = True) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.operations: list[Operation] = []
        self._path, self._intercept, self._keep = path, intercept, keep
        self._count = 0

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        """False: torch need not load its compiler to keep it away from this mode, as nothing is compiled while it is on."""
        return False

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        result = func(*args, **kwargs)
        name = func._schema.name.split("::")[-1]
        operation = Operation(self._count, name, args, kwargs, self._path.current, user_line(2) if self._keep or self._intercept else "")
        self._count += 1
        results = result if isinstance(result, (tuple, list)) else (result,)
        operation.outputs = [each for each in results if isinstance(each, Tensor)]
        if self._keep:
            self.operations.append(operation)
        return self._intercept(operation, result) if self._intercept else result


class Stop(Exception):
    """Raised by an intercept to end the traced run; `found` carries the answer."""

    def __init__(self, found: Any = None) -> None:
        super().__init__()
        self.found = found


@contextlib.contextmanager
def conditions_of(call: ForwardCall) -> Iterator[None]:
    """Inside, RNG, grad mode and autocast are as they were at `call`, and compiled code runs eagerly."""
    torch.set_rng_state(call.rng)
    # Where nothing was compiled there is nothing to disarm, and loading the compiler takes a second.
    stance = getattr(torch.compiler, "set_stance", None) if "torch._dynamo" in sys.modules else None
    eager = stance("force_eager") if stance else contextlib.nullcontext()
    with eager, torch.set_grad_enabled(call.grad_enabled), autocast_of(call):
        yield


def rerun(call: ForwardCall, intercept: Intercept | None = None, keep: bool = True, rows: int | None = None) -> tuple[Any, list[Operation]]:
    """Run `call` again (only the first `rows` of the batch if given) and return (output, operations). For use inside a forked copy."""
    module = bare(call.module)
    args, kwargs = (call.args, call.kwargs) if rows is None else (first_rows(call.args, rows, call), first_rows(call.kwargs, rows, call))
    with conditions_of(call), ModulePath(module) as path:
        tracer = Tracer(path, intercept, keep)
        with tracer:
            output = module(*args, **kwargs)
    return output, tracer.operations


def batch_size(call: ForwardCall) -> int:
    """The leading dimension of the first input tensor with one; 0 if there is none."""
    for value in (*call.args, *call.kwargs.values()):
        if isinstance(value, Tensor) and value.dim() > 0:
            return value.shape[0]
    return 0


def first_rows(value: Any, rows: int, call: ForwardCall) -> Any:
    """`value` with every tensor whose leading dimension is the batch size cut to its first `rows`."""
    size = batch_size(call)
    if isinstance(value, Tensor):
        return value[:rows] if value.dim() > 0 and value.shape[0] == size else value
    if isinstance(value, dict):
        return {key: first_rows(item, rows, call) for key, item in value.items()}
    if isinstance(value, tuple) and type(value) is tuple:
        return tuple(first_rows(item, rows, call) for item in value)
    if isinstance(value, list):
        return [first_rows(item, rows, call) for item in value]
    return value
