"""Folders that are there whole or not at all, and that tell when a byte of them has changed."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

STATE = "state.json"  # what a folder says of itself, the checksums of its other files and its own
PARTIAL = ".partial-"
CHUNK = 1 << 20


def begin(target: Path) -> Path:
    """An empty folder beside `target`, to be filled and given to `publish`; what an earlier attempt at `target` left is gone."""
    target.parent.mkdir(parents=True, exist_ok=True)
    partial, replaced = partial_of(target), _replaced(target)
    for left in (partial, replaced):
        shutil.rmtree(left, ignore_errors=True)
    partial.mkdir()
    return partial


def partial_of(target: Path) -> Path:
    """Where `target` is while it is written."""
    return target.with_name(f"{PARTIAL}{target.name}")


def _replaced(target: Path) -> Path:
    return target.with_name(f"{PARTIAL}replaced-{target.name}")


def publish(partial: Path, target: Path, state: dict[str, Any]) -> None:
    """`target` is what `partial` was, sealed in its state.json, and on the disk. Raises OSError; `target` is then as before.

    Files and folders are flushed before and after the rename, so that a power cut cannot leave a name without its bytes
    (Pillai et al. 2014, "All File Systems Are Not Created Equal").
    """
    files = {str(file.relative_to(partial)): checksum(file) for file in sorted(partial.rglob("*")) if file.is_file()}
    sealed = {**state, "files": files}
    (partial / STATE).write_text(json.dumps({**sealed, "seal": _seal(sealed)}, indent=2) + "\n", encoding="utf-8")
    for path in (*partial.rglob("*"), partial):
        flush(path)
    replaced = _replaced(target)
    if target.exists():
        target.rename(replaced)
    partial.rename(target)
    flush(target.parent)
    shutil.rmtree(replaced, ignore_errors=True)


def read(folder: Path) -> dict[str, Any]:
    """The state that `folder` was published with, every file being as it was then. Raises ValueError naming what is damaged."""
    file = folder / STATE
    try:
        state = json.loads(file.read_text(encoding="utf-8"))
        seal, files = state.pop("seal"), dict(state["files"])
    except FileNotFoundError:
        raise ValueError(f"{STATE} is missing") from None
    except (AttributeError, KeyError, TypeError, ValueError, OSError) as problem:
        raise ValueError(f"{STATE} cannot be read: {type(problem).__name__}: {problem}") from problem
    if seal != _seal(state):
        raise ValueError(f"{STATE} has changed since it was written")
    for name, expected in files.items():
        try:
            found = checksum(folder / name)
        except FileNotFoundError:
            raise ValueError(f"{name} is missing") from None
        except OSError as problem:
            raise ValueError(f"{name} cannot be read: {problem.strerror}") from problem
        if found != expected:
            raise ValueError(f"{name} has changed since it was written (its checksum differs)")
    del state["files"]
    whole: dict[str, Any] = state
    return whole


def checksum(file: Path) -> str:
    """sha256 of the file's bytes, in hex."""
    digest = hashlib.sha256()
    with file.open("rb") as handle:
        for chunk in iter(lambda: handle.read(CHUNK), b""):
            digest.update(chunk)
    return digest.hexdigest()


def flush(path: Path) -> None:
    """The bytes of a file, or the names in a folder, have reached the disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def as_os_error(write: Callable[[], None], file: Path) -> None:
    """`write` has written `file`; a failure that its library tells in words only is raised as the OSError it was."""
    try:
        write()
    except OSError:
        raise
    except Exception as problem:
        words = str(problem)
        number = int(words.rpartition("os error ")[2].rstrip(") ")) if "(os error " in words else 0
        if not number:
            raise
        raise OSError(number, os.strerror(number), str(file)) from problem


def _seal(state: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(state, sort_keys=True).encode()).hexdigest()
