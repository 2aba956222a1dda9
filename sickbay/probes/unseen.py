"""Functions that stand between a script and torch without showing.

Python leaves frames out of a warning's `stacklevel` when their file's name holds both "importlib" and "_bootstrap"
(`_is_internal_frame` in Lib/warnings.py): a warning about the user's call must name the user's line, as it does without us.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable
from types import FunctionType
from typing import Any, TypeVar

import torch
from torch.utils._python_dispatch import _disable_current_modes

Function = TypeVar("Function", bound=Callable[..., Any])

_NOTHING = contextlib.nullcontext()
_FILE = os.path.join(os.path.dirname(__file__), "<unseen importlib._bootstrap>")


def modes_present() -> bool:
    """True where the script has switched on a function or dispatch mode."""
    return bool(torch._C._len_torch_function_stack() or torch._C._len_torch_dispatch_stack())


def out_of_sight() -> contextlib.AbstractContextManager[Any]:
    """Inside, no function or dispatch mode that the script has switched on sees what is computed; nothing to do where there is none."""
    if not modes_present():
        return _NOTHING
    stack = contextlib.ExitStack()
    stack.enter_context(torch._C.DisableTorchFunction())
    stack.enter_context(_disable_current_modes())
    return stack


def unseen(function: Function) -> Function:
    """`function`, whose frames no warning's `stacklevel` counts; they still belong to a file of sickbay's."""
    function.__code__ = function.__code__.replace(co_filename=_FILE)
    return function


def interpose(function: Callable[..., Any], around: Callable[[Any], Callable[..., Any]]) -> Callable[[], None]:
    """Every call of `function` now goes to `around(original)`, by whatever name it was imported; the returned function undoes it.

    The function object stays the same one: pickles that name it, tables keyed by it and earlier imports of it go on working.
    Raises ValueError unless `function` is plain Python without a closure.
    """
    if not isinstance(function, FunctionType) or function.__closure__:
        raise ValueError(f"{function!r} is no plain function, or has a closure: its code cannot be exchanged")
    code = function.__code__
    original = FunctionType(code, function.__globals__, function.__name__, function.__defaults__)
    original.__kwdefaults__, original.__annotations__ = function.__kwdefaults__, function.__annotations__
    original.__qualname__, original.__doc__ = function.__qualname__, function.__doc__
    defaults, wrapped = function.__kwdefaults__, function.__dict__.get("__wrapped__")
    stub = _stub.__code__.replace(co_name=function.__name__)
    function.__code__ = stub
    function.__kwdefaults__ = {**(defaults or {}), "_replacement": around(original)}
    function.__wrapped__ = original  # type: ignore[attr-defined]  # for inspect and torch.jit, which read signature and source

    def undo() -> None:
        if function.__code__ is stub:
            function.__code__, function.__kwdefaults__ = code, defaults
            if wrapped is None:
                del function.__dict__["__wrapped__"]
            else:
                function.__dict__["__wrapped__"] = wrapped

    return undo


@unseen
def _stub(*args: Any, _replacement: Any, **kwargs: Any) -> Any:
    # A default of the function itself, since its globals are its own module's, and torch's compiler follows defaults.
    return _replacement(*args, **kwargs)
