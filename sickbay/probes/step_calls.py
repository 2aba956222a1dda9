"""Where the script's own files call `.step`: whether a scheduler that never moved is stepped anywhere at all."""

from __future__ import annotations

import ast
import sys
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path

from sickbay.patient import is_user_file

_MAX_FILES, _MAX_BYTES = 64, 1 << 20


@dataclass
class StepCalls:
    """`own_loop`: the script's lines step the optimizer, no library's loop does. `others`: lines that call another `.step`."""

    own_loop: bool = False
    others: list[str] = field(default_factory=list)


def step_calls(updates: Iterable[str]) -> StepCalls:
    """What the user's files say; `updates`: the lines `file:line` from which an optimizer was stepped."""
    lines = {(name, int(number)) for name, _, number in (line.rpartition(":") for line in updates) if number.isdecimal()}
    found: list[tuple[str, int, str]] = []
    for name in _files(lines):
        try:
            tree = ast.parse(Path(name).read_text(encoding="utf-8"))
        except (OSError, ValueError, SyntaxError):
            continue
        for node in ast.walk(tree):
            method = node.func if isinstance(node, ast.Call) else None
            if isinstance(method, ast.Attribute) and method.attr == "step":
                found += [(name, line, ast.unparse(method.value)) for line in {method.lineno, method.end_lineno or method.lineno}]
    stepped = {receiver for name, line, receiver in found if (name, line) in lines}
    others = [f"{name}:{line}" for name, line, receiver in found if receiver not in stepped]
    return StepCalls(bool(stepped), others)


def _files(lines: set[tuple[str, int]]) -> list[str]:
    """The user's source files: those of `lines`, and every module that is no installed package."""
    names = {name for name, _ in lines}
    for known, module in list(sys.modules.items()):
        name = getattr(module, "__file__", None)
        if not known.startswith("sickbay.") and isinstance(name, str) and name.endswith(".py") and is_user_file(name):
            names.add(name)
    readable = [name for name in sorted(names) if Path(name).is_file() and Path(name).stat().st_size < _MAX_BYTES]
    return readable[:_MAX_FILES]
