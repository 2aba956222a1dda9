"""Functions that stand between a script and torch without showing.

Python leaves frames out of a warning's `stacklevel` when their file's name holds both "importlib" and "_bootstrap"
(`_is_internal_frame` in Lib/warnings.py): a warning about the user's call must name the user's line, as it does without us.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from types import CodeType, FunctionType
from typing import Any, TypeVar

Function = TypeVar("Function", bound=Callable[..., Any])

_FILE = os.path.join(os.path.dirname(__file__), "<unseen importlib._bootstrap>")


def unseen(function: Function) -> Function:
    """`function`, whose frames no warning's `stacklevel` counts; they still belong to a file of sickbay's."""
    function.__code__ = function.__code__.replace(co_filename=_FILE)
    return function


def interpose(function: FunctionType, around: Callable[[Any], Callable[..., Any]]) -> Callable[[], None]:
    """Every call of `function` now goes to `around(original)`, by whatever name it was imported; the returned function undoes it.

    The function object stays the same one: pickles that name it, tables keyed by it and earlier imports of it go on working.
    `function` must be plain Python without a closure; raises ValueError otherwise.
    """
    if function.__closure__:
        raise ValueError(f"{function.__qualname__} has a closure: its code cannot be exchanged")
    code = function.__code__
    original = FunctionType(code, function.__globals__, function.__name__, function.__defaults__)
    original.__kwdefaults__, original.__annotations__ = function.__kwdefaults__, function.__annotations__
    original.__qualname__, original.__doc__ = function.__qualname__, function.__doc__
    stub = _stub_for(around(original), function)
    function.__code__ = stub
    function.__wrapped__ = original  # type: ignore[attr-defined]  # for inspect and torch.jit, which read signature and source

    def undo() -> None:
        if function.__code__ is stub:
            function.__code__ = code
            function.__dict__.pop("__wrapped__", None)

    return undo


def _stub_for(replacement: Callable[..., Any], function: FunctionType) -> CodeType:
    """Code that calls `replacement`, which lies among its constants: the function's globals are its own module's, not ours."""

    def stub(*args: Any, **kwargs: Any) -> Any:
        replacement: Any = "the replacement"
        return replacement(*args, **kwargs)

    constants = tuple(replacement if constant == "the replacement" else constant for constant in stub.__code__.co_consts)
    return stub.__code__.replace(co_consts=constants, co_name=function.__name__, co_filename=_FILE)
