"""Runs at the start of the watched script's own interpreter, before its first line, and leaves no trace of having been there.

The supervisor puts this folder first in PYTHONPATH, so that Python itself runs the script: `__main__`, tracebacks, exit codes
and signals are Python's own because nothing stands between them. When this file is done, the environment, sys.path and
the `sitecustomize` module are what they would have been without it.
"""

import os
import sys


def _restore_environment(folder: str) -> None:
    before = os.environ.pop("SICKBAY_PYTHONPATH", None)
    if before is None:
        os.environ.pop("PYTHONPATH", None)
    else:
        os.environ["PYTHONPATH"] = before
    sys.path[:] = [entry for entry in sys.path if entry != folder]


def _run_the_real_one() -> bool:
    """The sitecustomize that this file stands before has run, as the module of that name; False if there is none."""
    from importlib.machinery import PathFinder

    spec = PathFinder.find_spec("sitecustomize")
    if spec is None or spec.loader is None:
        return False
    from importlib.util import module_from_spec

    module = module_from_spec(spec)
    sys.modules["sitecustomize"] = module
    spec.loader.exec_module(module)
    return True


def _enter(root: str, settings: str) -> None:
    already = set(sys.modules)
    sys.path.insert(0, root)
    try:
        from sickbay import entry
    except Exception as problem:
        sys.stderr.write(f"sickbay: this run is not watched: {type(problem).__name__}: {problem}\n")
        return
    finally:
        sys.path.remove(root)
    entry.begin(settings, already)


def _start() -> bool:
    folder = os.path.dirname(os.path.abspath(__file__))
    settings = os.environ.pop("SICKBAY_SETTINGS", None)
    _restore_environment(folder)
    try:
        return _run_the_real_one()
    finally:
        if settings is not None:
            _enter(os.path.dirname(os.path.dirname(folder)), settings)


if not _start():
    # site.py takes this, and only this, as "there is no sitecustomize": sys.modules then has none, as in a bare run.
    raise ImportError("no sitecustomize", name="sitecustomize")
