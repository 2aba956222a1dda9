"""Somebody's script: what it is, whether it can be run, and the command and environment with which Python runs it for sickbay.

Python itself runs the script (`startup/sitecustomize.py` says how sickbay gets in), so nothing here imitates the interpreter.
"""

from __future__ import annotations

import os
import stat
import sys
from dataclasses import dataclass
from pathlib import Path

from sickbay.core.errors import UsageError
from sickbay.core.settings import Settings

SETTINGS_VARIABLE = "SICKBAY_SETTINGS"
PYTHONPATH_VARIABLE = "SICKBAY_PYTHONPATH"
STARTUP = str(Path(__file__).resolve().parent / "startup")
LONGEST_SCRIPT = 16 << 20  # bytes read to tell whether it is Python; a checkpoint named by mistake may be any size
OPTIONS_WITH_VALUE = "WX"


@dataclass(frozen=True)
class Script:
    """What the user asked to run: a file, or with `module` a module's name; `arguments` are its own, untouched."""

    name: str
    arguments: tuple[str, ...] = ()
    module: bool = False

    @property
    def stem(self) -> str:
        """A short name for folders: `train` for train.py, `pkg.train` for -m pkg.train."""
        if self.module:
            return self.name
        return "stdin" if self.name == "-" else Path(os.path.abspath(self.name)).stem or "script"

    def command(self) -> list[str]:
        """The command line with which plain Python runs it, with the interpreter options that this process was started with."""
        return [sys.executable, *interpreter_options(sys.orig_argv), *(("-m",) if self.module else ()), self.name, *self.arguments]

    def environment(self, settings: Settings) -> dict[str, str]:
        """The environment that lets sickbay in; the startup file takes all of it out again before the script's first line."""
        environment = dict(os.environ)
        before = environment.get("PYTHONPATH")
        if before is not None:
            environment[PYTHONPATH_VARIABLE] = before
        environment["PYTHONPATH"] = os.pathsep.join([STARTUP, before] if before else [STARTUP])
        environment[SETTINGS_VARIABLE] = settings.to_json()
        return environment

    def check(self) -> None:
        """Raises UsageError unless there is something that Python could run; a syntax error in a .py file is Python's to report."""
        if sys.flags.ignore_environment or sys.flags.no_site:
            raise UsageError("a script cannot be watched under Python's -E, -I or -S: start sickbay without that option, or set SICKBAY=0")
        if self.module:
            _check_module(self.name)
        elif self.name != "-":
            _check_file(Path(self.name))


def interpreter_options(orig_argv: list[str]) -> list[str]:
    """The options between the interpreter and its program in `orig_argv`: `python -u -W error -m sickbay run` gives `-u -W error`."""
    options: list[str] = []
    rest = iter(orig_argv[1:])
    for word in rest:
        if word == "--check-hash-based-pycs":
            options += [word, next(rest, "default")]
            continue
        if not word.startswith("-") or word in ("-", "--"):
            break
        if word.startswith("--"):
            options.append(word)
            continue
        for place, letter in enumerate(word[1:], 1):
            if letter in "cm":
                return [*options, word[:place]] if place > 1 else options
            if letter in OPTIONS_WITH_VALUE:
                options.append(word)
                if place == len(word) - 1:
                    options.append(next(rest, ""))
                break
        else:
            options.append(word)
    return options


def _check_file(path: Path) -> None:
    try:
        mode = path.stat().st_mode
        if stat.S_ISDIR(mode):
            if (path / "__main__.py").is_file():
                return
            raise UsageError(f"{path} is a folder without __main__.py: name the script itself, or use `run -m MODULE`")
        if not stat.S_ISREG(mode):  # reading a pipe would take its content from the script
            return
        with path.open("rb") as file:
            content = file.read(LONGEST_SCRIPT)
    except FileNotFoundError:
        raise UsageError(f"there is no script {path}{_nearest(path)}") from None
    except (OSError, ValueError) as problem:
        raise UsageError(f"{path} cannot be read: {getattr(problem, 'strerror', None) or problem}") from None
    if b"\0" in content:
        if not _runnable_binary(path, content):
            raise UsageError(f"{path} is not Python: it is a binary file; name the training script")
    elif path.suffix not in (".py", ".pyw"):
        _check_is_program(path, content)


def _check_is_program(path: Path, content: bytes) -> None:
    """Raises UsageError for text that is no Python, and for data that happens to be an expression (JSON, a notebook)."""
    import ast
    import warnings

    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            tree = ast.parse(content, str(path))
    except (SyntaxError, ValueError, RecursionError, MemoryError) as problem:
        line = f" (line {problem.lineno}: {problem.msg})" if isinstance(problem, SyntaxError) and problem.lineno else ""
        raise UsageError(f"{path} is not Python{line}: name the training script") from None
    if tree.body and all(isinstance(node, ast.Expr) and not any(isinstance(n, ast.Call) for n in ast.walk(node)) for node in tree.body):
        raise UsageError(f"{path} is not a program: it holds data only; name the training script")


def _runnable_binary(path: Path, content: bytes) -> bool:
    """True for what Python runs without being text: its own compiled files, and zip archives with a __main__."""
    import importlib.util
    import zipfile

    if content.startswith(importlib.util.MAGIC_NUMBER):
        return True
    try:
        with zipfile.ZipFile(path) as archive:
            return bool({"__main__.py", "__main__.pyc"} & set(archive.namelist()))
    except (OSError, zipfile.BadZipFile):
        return False


def _check_module(name: str) -> None:
    from importlib.machinery import BuiltinImporter, FrozenImporter, PathFinder

    top = name.partition(".")[0]
    # Only the top name: finding a submodule would import its package, and that is the script's business.
    places = [os.getcwd(), *sys.path]
    if name.endswith(".py") and Path(name).is_file():
        raise UsageError(f"{name!r} is a file, not a module: leave out -m (`sickbay run {name}`)")
    if not top or not any((BuiltinImporter.find_spec(top), FrozenImporter.find_spec(top), PathFinder.find_spec(top, places))):
        raise UsageError(f"there is no module {name!r}: run from the folder that holds it, or install it")


def _nearest(path: Path) -> str:
    import difflib

    try:
        names = [entry.name for entry in (path.parent).iterdir() if entry.suffix == ".py"]
    except OSError:
        names = []
    near = difflib.get_close_matches(path.name, names, n=1, cutoff=0.6)
    return f": did you mean {path.parent / near[0]}?" if near else f" in {Path(os.path.abspath(path)).parent}: check the path"
