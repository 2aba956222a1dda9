"""Somebody's script: what it is, the command that runs it as plain Python would, and sickbay's own first and last words inside it.

Python itself runs the script (`startup/sitecustomize.py` says how sickbay gets in), so nothing here imitates the interpreter.
"""

from __future__ import annotations

import os
import sys
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any

from sickbay.core.errors import UsageError
from sickbay.core.settings import Settings

if TYPE_CHECKING:
    from collections.abc import Mapping

SETTINGS_VARIABLE = "SICKBAY_SETTINGS"
PYTHONPATH_VARIABLE = "SICKBAY_PYTHONPATH"
STARTUP = str(Path(__file__).resolve().parent / "startup")
_OPTIONS_WITH_VALUE = "WX"


@dataclass(frozen=True)
class Script:
    """What the user asked to run: a file, or with `module` a module's name; `arguments` are its own, untouched."""

    name: str
    arguments: tuple[str, ...] = ()
    module: bool = False

    @property
    def stem(self) -> str:
        """A short name for folders: `train` for train.py, `-m pkg.train` gives `pkg.train`."""
        return self.name if self.module else Path(self.name).stem or "script"

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
        else:
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
            if letter in _OPTIONS_WITH_VALUE:
                options.append(word)
                if place == len(word) - 1:
                    options.append(next(rest, ""))
                break
        else:
            options.append(word)
    return options


def _check_file(path: Path) -> None:
    try:
        if path.is_dir():
            if (path / "__main__.py").is_file():
                return
            raise UsageError(f"{path} is a folder without __main__.py: name the script itself, or use `run -m MODULE`")
        content = path.read_bytes()
    except FileNotFoundError:
        raise UsageError(f"there is no script {path}{_nearest(path)}") from None
    except (OSError, ValueError) as problem:
        raise UsageError(f"{path} cannot be read: {getattr(problem, 'strerror', None) or problem}") from None
    if b"\0" in content:
        if not _runnable_binary(path, content):
            raise UsageError(f"{path} is not Python: it is a binary file; name the training script")
    elif path.suffix not in (".py", ".pyw"):
        _check_compiles(path, content)


def _check_compiles(path: Path, content: bytes) -> None:
    import warnings

    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            compile(content, str(path), "exec", dont_inherit=True)
    except (SyntaxError, ValueError, RecursionError, MemoryError) as problem:
        line = f" (line {problem.lineno}: {problem.msg})" if isinstance(problem, SyntaxError) and problem.lineno else ""
        raise UsageError(f"{path} is not Python{line}: name the training script") from None


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
    if not top or not any((BuiltinImporter.find_spec(top), FrozenImporter.find_spec(top), PathFinder.find_spec(top, places))):
        way_out = (
            f": to run the file, leave out -m (`sickbay run {name}`)"
            if Path(name).is_file()
            else ": run from the folder that holds it, or install it"
        )
        raise UsageError(f"there is no module {name!r}{way_out}")


def _nearest(path: Path) -> str:
    import difflib

    try:
        names = [entry.name for entry in (path.parent).iterdir() if entry.suffix == ".py"]
    except OSError:
        names = []
    near = difflib.get_close_matches(path.name, names, n=1, cutoff=0.6)
    return f": did you mean {path.parent / near[0]}?" if near else f" in {Path(os.path.abspath(path)).parent}: check the path"


# ---------------------------------------------------------------- inside the script's own process


def begin(settings_text: str) -> None:
    """The watch is on and will be told how the script ended. Never raises: at worst the script runs unwatched, with the reason on file."""
    already = set(sys.modules)
    try:
        settings = Settings.from_json(settings_text)
        try:
            from sickbay import doctor

            watch = doctor.start(settings, rank=int(os.environ.get("RANK") or 0))
        except Exception as problem:
            _leave_reason(settings.out, f"the watch could not be started: {type(problem).__name__}: {problem}")
        else:
            _Ending(watch).arrange()
        _give_back_names(already)
    except Exception as problem:
        sys.stderr.write(f"sickbay: this run is not watched: {type(problem).__name__}: {problem}\n")


class _Ending:
    """Tells the watch once how the script ended: with an uncaught exception, before its traceback is printed; otherwise at exit."""

    def __init__(self, watch: Any) -> None:
        self._watch = watch
        self._process = os.getpid()
        self._python_hook = sys.excepthook
        self._done = False

    def arrange(self) -> None:
        import atexit

        # Registered before anything of the script's, hence called after all of it.
        atexit.register(self._at_exit)
        # Both names: libraries ask `sys.excepthook is sys.__excepthook__` to learn whether somebody else's hook is installed.
        sys.excepthook = sys.__excepthook__ = self._on_exception

    def _on_exception(self, kind: type[BaseException], exception: BaseException, traceback: TracebackType | None) -> None:
        # Python stores the exception there only when it really is uncaught; scripts may call the hook to print one they caught.
        if getattr(sys, "last_value", None) is exception:
            self._tell("failed", exception)
        self._python_hook(kind, exception, traceback)

    def _at_exit(self) -> None:
        exception = getattr(sys, "last_value", None)
        self._tell("failed" if exception is not None else "finished", exception)

    def _tell(self, ended: str, exception: BaseException | None) -> None:
        if self._done or os.getpid() != self._process:  # a forked child must not end its parent's watch
            return
        self._done = True
        try:
            self._watch.finish(ended, exception)
        except BaseException as problem:  # also a second ctrl-C: the script's own ending goes on
            sys.stderr.write(f"sickbay: the watch did not end well: {type(problem).__name__}: {problem}\n")


def _give_back_names(already: set[str]) -> None:
    """Modules loaded by sickbay that the script would find in its own folder under the same name are unloaded again."""
    folder = os.getcwd() if sys.argv[0] == "-m" else os.path.dirname(os.path.realpath(sys.argv[0]))
    try:
        own = {name.partition(".")[0] for name in os.listdir(folder)}
    except OSError:
        return
    taken = {name for name in sys.modules if name not in already and name.partition(".")[0] in own - {"sickbay"}}
    for name in taken:
        del sys.modules[name]


def reason_file(out: str, rank: int) -> Path:
    """Where the script's process leaves word that it could not be watched."""
    return Path(out) / f".unwatched-{rank}"


def unwatched_reason(out: str, ranks: Mapping[int, Any] | range) -> str | None:
    """Why the script could not be watched, if its process left word; the word is taken away."""
    for rank in ranks:
        try:
            text = reason_file(out, rank).read_text(encoding="utf-8")
            reason_file(out, rank).unlink()
            return text
        except OSError:
            continue
    return None


def _leave_reason(out: str, reason: str) -> None:
    try:
        reason_file(out, int(os.environ.get("RANK") or 0)).write_text(reason, encoding="utf-8")
    except OSError:
        sys.stderr.write(f"sickbay: {reason}\n")
