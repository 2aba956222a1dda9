"""Makes the traceback of an uncaught exception the one that plain Python would print.

Three kinds of entries are there only because the run is watched: sickbay's own functions; the way round that torch takes
when a function mode is on; and `inner`, through which torch's `Module._call_impl` goes when there is any hook.
"""

from __future__ import annotations

import os
import sys
from types import CodeType, FrameType, TracebackType
from typing import Any

_OWN = os.path.dirname(os.path.abspath(__file__)) + os.sep
_REFERENCE = os.path.join(_OWN, "reference") + os.sep
_MODULE_FILE = os.path.join("torch", "nn", "modules", "module.py")
_OVERRIDES_FILE = os.path.join("torch", "overrides.py")
_MODULE_HOOKS = ("_backward_hooks", "_backward_pre_hooks", "_forward_hooks", "_forward_pre_hooks")
_GLOBAL_HOOKS = ("_global_backward_pre_hooks", "_global_backward_hooks", "_global_forward_hooks", "_global_forward_pre_hooks")


def as_in_plain_python(exception: BaseException) -> None:
    """The tracebacks of `exception`, and of those that it came from, are as they would be if nothing had been watched."""
    seen: set[int] = set()
    waiting: list[BaseException | None] = [exception]
    while waiting:
        current = waiting.pop()
        if current is None or id(current) in seen:
            continue
        seen.add(id(current))
        waiting += [current.__cause__, current.__context__, *getattr(current, "exceptions", ())]
        current.__traceback__ = _linked(_kept(current.__traceback__))


def _kept(entry: TracebackType | None) -> list[TracebackType]:
    kept: list[TracebackType] = []
    first = True
    while entry is not None:
        code = entry.tb_frame.f_code
        if not first and _is_own(code.co_filename):
            if code.co_name == "__torch_function__":
                _drop_way_round(kept)
        elif kept and _is(code, "inner", _MODULE_FILE) and _is(kept[-1].tb_frame.f_code, "_call_impl", _MODULE_FILE):
            straight = _straight(kept[-1]) if _unhooked(kept[-1].tb_frame) else None
            if straight is not None:
                kept[-1] = straight
            else:
                kept.append(entry)
        else:
            kept.append(entry)
        first, entry = False, entry.tb_next
    return kept


def _linked(entries: list[TracebackType]) -> TracebackType | None:
    """The same entries as one chain; each frame keeps its place."""
    following: TracebackType | None = None
    for entry in reversed(entries):
        entry.tb_next = following
        following = entry
    return following


def _is_own(filename: str) -> bool:
    return filename.startswith(_OWN) and not filename.startswith(_REFERENCE)


def _is(code: CodeType, name: str, file: str) -> bool:
    return code.co_name == name and code.co_filename.endswith(file)


def _drop_way_round(kept: list[TracebackType]) -> None:
    """A mode is called by `handle_torch_function`, and calls the function that asked for it a second time: that call remains."""
    if len(kept) >= 2 and _is(kept[-1].tb_frame.f_code, "handle_torch_function", _OVERRIDES_FILE):
        del kept[-2:]


def _unhooked(frame: FrameType) -> bool:
    """True if the module called in `frame` has no hook but ours, so that torch would have called its forward straight away."""
    module, internals = frame.f_locals.get("self"), frame.f_globals
    own = any(len(getattr(module, name, ())) for name in _MODULE_HOOKS)
    return not own and not any(number >= 0 for name in _GLOBAL_HOOKS for number in internals.get(name, ()))


def _straight(entry: TracebackType) -> TracebackType | None:
    """`entry` of `_call_impl` at the first call there, which is that of the forward without hooks; None if it cannot be told."""
    opcode: Any = sys.modules.get("opcode")  # torch has loaded it; the script's folder may hold another of that name
    code = entry.tb_frame.f_code
    call = getattr(opcode, "opmap", {}).get("CALL_FUNCTION_EX")
    offset = next((index for index in range(0, len(code.co_code), 2) if code.co_code[index] == call), None)
    line = next((line for start, end, line in code.co_lines() if offset is not None and start <= offset < end), None)
    if offset is None or line is None:
        return None
    return TracebackType(entry.tb_next, entry.tb_frame, offset, line)
