"""Inside the script's own process: the watch starts when torch arrives, and is told how the script ended.

Called by `startup/sitecustomize.py` before the script's first line; from then on the script runs as if nothing had been there.
Loads next to nothing: every module loaded here is one that the script did not ask for.
"""

from __future__ import annotations

import os
import sys

TYPE_CHECKING = False  # typing itself would cost every script its import
if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Sequence
    from importlib.machinery import ModuleSpec
    from types import ModuleType, TracebackType
    from typing import Any


def begin(settings_text: str, already: set[str]) -> None:
    """The watch will start when the script imports torch, and be told how the script ended. Never raises.

    Until then nothing of sickbay is loaded but this file, so that a script without torch pays nothing for it.
    `already`: the modules that were loaded before any of sickbay's.
    """
    try:
        import json

        settings = json.loads(settings_text)
        ending = _Ending(keep_frames=settings["debug"])
        ending.arrange()
        folder = _script_folder()
        sys.meta_path.insert(0, _WhenTorchArrives(settings_text, settings["out"], ending, folder))
        _leave_reason(settings["out"], "the script did not import torch")
        _give_back_names(_names_in(folder), already)
    except Exception as problem:
        sys.stderr.write(f"sickbay: this run is not watched: {type(problem).__name__}: {problem}\n")


class _WhenTorchArrives:
    """Starts the watch right after torch's own first import, in the script's process and not in one that it forked."""

    def __init__(self, settings_text: str, out: str, ending: _Ending, folder: str) -> None:
        self._settings_text = settings_text
        self._out = out
        self._ending = ending
        self._folder = folder
        self._process = os.getpid()

    def find_spec(self, name: str, path: Sequence[str] | None, target: ModuleType | None = None) -> ModuleSpec | None:
        """Torch's spec as the other finders give it, with a loader that calls back once; None for all other modules."""
        if name != "torch" or os.getpid() != self._process:
            return None
        spec = None
        for finder in sys.meta_path:
            if finder is not self and spec is None:
                spec = finder.find_spec(name, path, target)
        if spec is not None and spec.loader is not None:
            self._call_back_after(spec.loader)
        return spec

    def _call_back_after(self, loader: Any) -> None:
        execute = loader.exec_module

        def exec_module(module: ModuleType) -> None:
            loader.__dict__.pop("exec_module", None)
            execute(module)
            if self in sys.meta_path:
                sys.meta_path.remove(self)
                self._start()

        loader.exec_module = exec_module

    def _start(self) -> None:
        already, path = set(sys.modules), list(sys.path)
        namesakes = _names_in(self._folder) & sys.stdlib_module_names
        if namesakes:
            # What sickbay imports now must be the library's, and must not run a file of the script's.
            sys.path[:] = [entry for entry in path if os.path.realpath(entry or os.curdir) != self._folder]
        try:
            from sickbay import doctor, tracebacks
            from sickbay.core.settings import Settings

            self._ending.clean = tracebacks.as_in_plain_python
            self._ending.watch = doctor.start(Settings.from_json(self._settings_text), rank=_rank())
            _take_reason(self._out, _rank())
        except Exception as problem:
            _leave_reason(self._out, f"the watch could not be started: {type(problem).__name__}: {problem}")
        finally:
            if namesakes:
                sys.path[:] = path
                _give_back_names(namesakes, already)


class _Ending:
    """Tells the watch once how the script ended: with an uncaught exception, before its traceback is printed; otherwise at exit."""

    def __init__(self, keep_frames: bool) -> None:
        self.watch: Any = None
        self.clean: Callable[[BaseException], None] | None = None
        self._keep_frames = keep_frames
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
        if self.clean is not None and not self._keep_frames:
            try:
                self.clean(exception)
                traceback = exception.__traceback__
            except Exception as problem:
                sys.stderr.write(f"sickbay: the traceback holds frames of its own: {type(problem).__name__}: {problem}\n")
        # Python stores the exception there only when it really is uncaught; scripts may call the hook to print one they caught.
        if getattr(sys, "last_value", None) is exception:
            self._tell("failed", exception)
        self._python_hook(kind, exception, traceback)

    def _at_exit(self) -> None:
        exception = getattr(sys, "last_value", None)
        self._tell("failed" if exception is not None else "finished", exception)

    def _tell(self, ended: str, exception: BaseException | None) -> None:
        if self.watch is None or self._done or os.getpid() != self._process:  # a forked child must not end its parent's watch
            return
        self._done = True
        try:
            self.watch.finish(ended, exception)
        except BaseException as problem:  # also a second ctrl-C: the script's own ending goes on
            sys.stderr.write(f"sickbay: the watch did not end well: {type(problem).__name__}: {problem}\n")


def _script_folder() -> str:
    """The folder that the script will import from first; told before Python has put it into sys.path."""
    if sys.argv[0] == "-m":
        return os.path.realpath(os.getcwd())
    program = os.path.realpath(sys.argv[0])
    return program if os.path.isdir(program) else os.path.dirname(program)


def _names_in(folder: str) -> set[str]:
    """The top names of the modules that `folder` may hold."""
    try:
        return {name.partition(".")[0] for name in os.listdir(folder)} - {"sickbay", "torch"}
    except OSError:
        return set()


def _give_back_names(names: set[str], already: set[str]) -> None:
    """Of the modules loaded since `already`, those that the script has under the same name are unloaded, for it to find its own."""
    for loaded in [name for name in sys.modules if name not in already and name.partition(".")[0] in names]:
        del sys.modules[loaded]


def _rank() -> int:
    try:
        return int(os.environ.get("RANK") or 0)
    except ValueError:
        return 0


def unwatched_reason(out: str, ranks: Iterable[int]) -> str | None:
    """Why the script could not be watched, in the words of the first rank that left word; all such words are taken away."""
    reasons = [reason for reason in (_take_reason(out, rank) for rank in ranks) if reason]
    return reasons[0] if reasons else None


def _leave_reason(out: str, reason: str) -> None:
    try:
        with open(_reason_file(out, _rank()), "w", encoding="utf-8") as file:
            file.write(reason)
    except OSError:  # the supervisor will find nothing at all, and say so
        pass


def _take_reason(out: str, rank: int) -> str:
    try:
        with open(_reason_file(out, rank), encoding="utf-8") as file:
            reason = file.read()
        os.unlink(_reason_file(out, rank))
        return reason
    except OSError:
        return ""


def _reason_file(out: str, rank: int) -> str:
    return os.path.join(out, f".unwatched-{rank}")
