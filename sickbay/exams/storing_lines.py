"""Finds, in the script's own source, the line that puts values into a variable, and whether any line takes them out again."""

from __future__ import annotations

import ast
import re
import sys
import types
from collections.abc import Iterator
from functools import lru_cache
from pathlib import Path as FilePath

from sickbay.exams.reach import Path
from sickbay.patient import is_user_file

_PUTS = frozenset(("append", "appendleft", "extend", "add", "insert", "setdefault", "update", "push", "put", "put_nowait"))
_TAKES = frozenset(("pop", "popleft", "popitem", "clear", "remove", "get_nowait"))
_NAME = re.compile(r"[A-Za-z_]\w*")


def storing_line(path: Path, file: str, function: str) -> str:
    """`file:line` of the statement that stores into `path`; "" if no line of the script's does so by that name."""
    for name in _names(path):
        for place in _files(file):
            lines = sorted(_stores(place, name), key=lambda found: (-found[0], found[2] != function, found[1]))
            if lines:
                return f"{place}:{lines[0][1]}"
    return ""


def drops_elements(path: Path, file: str) -> bool:
    """True if some line of the script empties or shortens what `path` names: it is bounded by design."""
    for name in _names(path)[:1]:
        for place in _files(file):
            tree = _tree(place)
            if tree is not None and any(_drops(node, name) for node in ast.walk(tree)):
                return True
    return False


def _names(path: Path) -> list[str]:
    """The names along `path`, innermost first; indices are none."""
    return [match.group() for step in reversed(path) if not step.startswith("[") and (match := _NAME.search(step))]


def _files(first: str) -> list[str]:
    """`first`, if it is the user's, and then the user's other files that are loaded."""
    files = [first] if first and is_user_file(first) else []
    for module in list(sys.modules.values()):
        file = getattr(module, "__file__", None) if isinstance(module, types.ModuleType) else None
        if isinstance(file, str) and file.endswith(".py") and is_user_file(file) and file not in files:
            files.append(file)
    return files


@lru_cache(maxsize=32)
def _tree(file: str) -> ast.Module | None:
    try:
        return ast.parse(FilePath(file).read_text(encoding="utf-8", errors="replace"))
    except (OSError, SyntaxError, ValueError):
        return None


def _stores(file: str, name: str) -> Iterator[tuple[int, int, str]]:
    """(how telling, line, function) of each statement that puts something into `name`."""
    tree = _tree(file)
    if tree is None:
        return
    for function, in_loop, node in _walk(tree, "", False):
        weight = 0
        called = node.func if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute) and node.func.attr in _PUTS else None
        if (called is not None and _is(called.value, name)) or (isinstance(node, ast.AugAssign) and _is(node.target, name)):
            weight = 4
        elif isinstance(node, ast.Assign) and any(_is(target, name) for target in _targets(node)):
            subscripted = any(isinstance(target, ast.Subscript) for target in _targets(node))
            itself = any(_is(inner, name) for inner in ast.walk(node.value) if isinstance(inner, (ast.Name, ast.Attribute)))
            empty = isinstance(node.value, (ast.List, ast.Dict, ast.Constant, ast.Set))
            weight = 3 if subscripted or itself else 0 if empty else 2
        if weight:
            yield weight + in_loop, int(getattr(node, "lineno", 0)), function


def _walk(node: ast.AST, function: str, in_loop: bool) -> Iterator[tuple[str, bool, ast.AST]]:
    for child in ast.iter_child_nodes(node):
        inside, looping = function, in_loop
        if isinstance(child, (ast.FunctionDef, ast.AsyncFunctionDef)):
            inside, looping = child.name, False
        elif isinstance(child, (ast.For, ast.While, ast.AsyncFor)):
            looping = True
        yield inside, looping, child
        yield from _walk(child, inside, looping)


def _targets(node: ast.Assign) -> list[ast.expr]:
    flat: list[ast.expr] = []
    for target in node.targets:
        flat.extend(target.elts if isinstance(target, (ast.Tuple, ast.List)) else [target])
    return flat


def _is(node: ast.expr, name: str) -> bool:
    """True if `node` is `name`, something's attribute `name`, or an element of either."""
    while isinstance(node, (ast.Subscript, ast.Call)):
        node = node.value if isinstance(node, ast.Subscript) else node.func
        if isinstance(node, ast.Attribute) and node.attr in ("setdefault", "get"):
            node = node.value
    return (isinstance(node, ast.Name) and node.id == name) or (isinstance(node, ast.Attribute) and node.attr == name)


def _drops(node: ast.AST, name: str) -> bool:
    if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute) and node.func.attr in _TAKES:
        return _is(node.func.value, name)
    if isinstance(node, ast.Delete):
        return any(_is(target, name) for target in node.targets)
    if isinstance(node, (ast.For, ast.While, ast.FunctionDef)) and getattr(node, "name", "") != "__init__":
        # Emptied anew by every round of a loop, or every call of a function.
        return any(
            isinstance(inner, ast.Assign)
            and isinstance(inner.value, (ast.List, ast.Dict, ast.Call, ast.Subscript))
            and any(_is(target, name) and not isinstance(target, ast.Subscript) for target in _targets(inner))
            for inner in ast.walk(node)
        )
    return False
