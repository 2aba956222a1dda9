"""Times the script's own lines between two steps, and tells which of them make the batch.

Only the frames that the training step runs in are traced, and only from the end of one step to the first forward of the next. No frame
is held on to: its locals live as long as without us.
"""

from __future__ import annotations

import ast
import linecache
import sys
from dataclasses import dataclass, field
from types import CodeType, FrameType
from typing import Any

from sickbay.patient import is_user_file
from sickbay.probes.clock import Clock

_DEEPEST = 64
_COPYING = frozenset(("deepcopy", "clone"))
_COUNTING = frozenset(("range", "count", "enumerate", "tqdm", "trange"))
Place = tuple[str, str, int]  # file, function, line


@dataclass
class Stretch:
    """One traced stretch: seconds by line in order of appearance, and the lines its frames stood at when the forward began.

    `direct`: the innermost of them calls the model itself, so what it spends before is spent on the arguments.
    """

    spent: dict[Place, float] = field(default_factory=dict)
    stack: list[Place] = field(default_factory=list)
    direct: bool = False


class Statements:
    """`begin()` at the end of a step, `end()` where its forward begins; a debugger or coverage that traces already is left alone."""

    def __init__(self, clock: Clock) -> None:
        self._clock = clock
        self._codes: set[CodeType] = set()
        self._on = False
        self._at: Place = ("", "", 0)
        self._since = 0.0
        self._stretch = Stretch()

    def learn(self) -> None:
        """The functions on the stack now are those that a training step runs in."""
        self._codes = {frame.f_code for frame in _user_frames()}

    def begin(self) -> bool:
        """True if the lines up to `end` are timed."""
        if sys.gettrace() is not None or sys.getprofile() is not None or not self._codes:
            return False
        frames = _user_frames()
        if not frames:
            return False
        self._stretch, self._on = Stretch(), True
        self._at, self._since = _place(frames[0]), self._clock.now().clear
        for frame in frames:
            frame.f_trace = self._line
        sys.settrace(self._call)
        return True

    def excuse(self, seconds: float) -> None:
        """`seconds` of the line that is running are counted elsewhere."""
        if self._on:
            self._stretch.spent[self._at] = self._stretch.spent.get(self._at, 0.0) - seconds

    def end(self) -> Stretch | None:
        """What was seen since `begin`; None if nothing was traced. Nothing is traced any more."""
        if not self._on:
            return None
        self._charge()
        self._on = False
        if sys.gettrace() == self._call:
            sys.settrace(None)
        frames = _user_frames()
        for frame in frames:
            if frame.f_trace == self._line:
                frame.f_trace = None
        self._stretch.stack = [_place(frame) for frame in frames]
        self._stretch.direct = _called_directly()
        return self._stretch

    def _call(self, frame: FrameType, event: str, arg: Any) -> Any:
        return self._line if self._on and frame.f_code in self._codes else None

    def _line(self, frame: FrameType, event: str, arg: Any) -> Any:
        if not self._on:
            return None
        try:
            self._follow(frame, event)
        except Exception:  # what a trace function raises reaches the script
            self._on = False
        return self._line

    def _follow(self, frame: FrameType, event: str) -> None:
        self._charge()
        if event == "line":
            self._at = _place(frame)
            self._stretch.spent.setdefault(self._at, 0.0)
        elif event == "return":
            outer = next(iter(_user_frames(frame.f_back)), None)
            self._at = _place(outer) if outer is not None else ("", "", 0)
        self._since = self._clock.now().clear

    def _charge(self) -> None:
        self._stretch.spent[self._at] = self._stretch.spent.get(self._at, 0.0) + self._clock.now().clear - self._since


def _place(frame: FrameType) -> Place:
    return frame.f_code.co_filename, frame.f_code.co_name, frame.f_lineno


def _user_frames(start: FrameType | None = None) -> list[FrameType]:
    """The user's frames on the stack, innermost first."""
    frame = start if start is not None else sys._getframe(1)
    found = []
    for _ in range(_DEEPEST):
        if frame is None:
            break
        if is_user_file(frame.f_code.co_filename):
            found.append(frame)
        frame = frame.f_back  # type: ignore[assignment]
    return found


def _called_directly() -> bool:
    """True if nothing but torch's own call of a module lies between the innermost user's frame and the hooks."""
    frame: FrameType | None = sys._getframe(1)
    while frame is not None and not is_user_file(frame.f_code.co_filename):
        name = frame.f_code.co_filename
        if "/site-packages/" in name and "/site-packages/torch/" not in name:
            return False
        frame = frame.f_back
    return frame is not None


# --- what the lines mean ------------------------------------------------------------------------------------------------
def data_lines(stretch: Stretch, loss_source: str) -> set[Place]:
    """The lines of `stretch` whose results flow into the forward's arguments or the loss: those that make the batch."""
    found: set[Place] = set()
    for depth, at in enumerate(stretch.stack):
        needed = _loads(_statement(at[0], at[2]))
        file, _, line = loss_source.rpartition(":")
        if file == at[0] and line.isdecimal():
            needed |= _loads(_statement(file, int(line)))
        if depth == 0 and stretch.direct:
            found.add(at)
        for place in reversed([place for place in stretch.spent if place[:2] == at[:2]]):
            statement = _statement(place[0], place[2])
            if isinstance(statement, (ast.For, ast.AsyncFor)):
                if not _counts(statement.iter):
                    found.add(place)
                    needed |= _loads(statement)
            elif needed & _targets(statement):
                found.add(place)
                needed |= _loads(statement)
    return found


def idle_copies(stretch: Stretch) -> set[Place]:
    """The lines of `stretch` that copy (deepcopy, clone) into a name that the file never reads."""
    found = set()
    for place in stretch.spent:
        statement = _statement(place[0], place[2])
        targets = {name for name in _targets(statement) if "." not in name}
        if targets and _calls(statement) & _COPYING and not targets & _names_read(place[0]):
            found.add(place)
    return found


_trees: dict[str, ast.Module | None] = {}


def _tree(file: str) -> ast.Module | None:
    if file not in _trees:
        try:
            _trees[file] = ast.parse("".join(linecache.getlines(file)))
        except (SyntaxError, ValueError):
            _trees[file] = None
    return _trees[file]


def _statement(file: str, line: int) -> ast.stmt | None:
    """The innermost statement whose own lines (without the body of a block) contain `line`."""
    found: ast.stmt | None = None
    for node in ast.walk(_tree(file) or ast.Module([], [])):
        inside = isinstance(node, ast.stmt) and node.lineno <= line <= (node.end_lineno or node.lineno)
        if inside and (found is None or node.lineno >= found.lineno):  # type: ignore[attr-defined]
            found = node  # type: ignore[assignment]
    return found


def _header(statement: ast.stmt | None) -> list[ast.AST]:
    """The nodes of `statement` without those of its body."""
    if statement is None:
        return []
    if isinstance(statement, (ast.For, ast.AsyncFor)):
        parts: list[ast.AST] = [statement.target, statement.iter]
    elif isinstance(statement, (ast.With, ast.AsyncWith)):
        parts = [*statement.items]
    elif isinstance(statement, (ast.If, ast.While)):
        parts = [statement.test]
    elif hasattr(statement, "body"):
        parts = []
    else:
        parts = [statement]
    return [node for part in parts for node in ast.walk(part)]


def _dotted(node: ast.AST) -> str:
    """`a.b.c` of a chain of attributes; "" for anything else."""
    if isinstance(node, ast.Name):
        return node.id
    if isinstance(node, ast.Attribute):
        owner = _dotted(node.value)
        return f"{owner}.{node.attr}" if owner else ""
    return ""


def _loads(statement: ast.stmt | None) -> set[str]:
    nodes = _header(statement)
    return {_dotted(n) for n in nodes if isinstance(n, (ast.Name, ast.Attribute)) and isinstance(n.ctx, ast.Load)} - {""}


def _targets(statement: ast.stmt | None) -> set[str]:
    """The names that `statement` gives a value to; of `a[i] = x`, `a`."""
    names = set()
    nodes = _header(statement)
    of_comprehensions = {id(inner) for node in nodes if isinstance(node, ast.comprehension) for inner in ast.walk(node.target)}
    for node in nodes:
        if id(node) in of_comprehensions:
            continue
        if isinstance(node, (ast.Name, ast.Attribute)) and isinstance(node.ctx, ast.Store):
            names.add(_dotted(node))
        elif isinstance(node, ast.Subscript) and isinstance(node.ctx, ast.Store):
            names.add(_dotted(node.value))
    return names - {""}


def _calls(statement: ast.stmt | None) -> set[str]:
    """The last names of the functions that `statement` calls."""
    return {_dotted(n.func).rpartition(".")[2] or getattr(n.func, "attr", "") for n in _header(statement) if isinstance(n, ast.Call)}


def _counts(iterated: ast.expr) -> bool:
    """True for range() and what only counts or shows it."""
    return (
        isinstance(iterated, ast.Call)
        and {_dotted(n.func).rpartition(".")[2] for n in ast.walk(iterated) if isinstance(n, ast.Call)} <= _COUNTING
        and any(isinstance(n, ast.Call) and _dotted(n.func).endswith(("range", "count")) for n in ast.walk(iterated))
    )


def _names_read(file: str) -> set[str]:
    tree = _tree(file)
    return {n.id for n in ast.walk(tree) if isinstance(n, ast.Name) and isinstance(n.ctx, ast.Load)} if tree is not None else set()
