"""Runs a script twice, with plain Python and with `sickbay run`, so that tests can hold one against the other."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import textwrap
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ADDRESS = re.compile(rb"0x[0-9a-f]{8,}")  # differs from one process to the next
ROOT = Path(__file__).resolve().parent.parent


@dataclass
class Outcome:
    """What a process left: `code` is negative after a signal, as in subprocess."""

    code: int
    stdout: bytes
    stderr: bytes


def environment(**changes: str) -> dict[str, str]:
    """This process's environment in which the checkout's sickbay is found and nothing of a launcher is left."""
    kept = {k: v for k, v in os.environ.items() if not k.startswith(("SICKBAY", "RANK", "WORLD_SIZE", "TORCHELASTIC", "PYTEST"))}
    return {**kept, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", **changes}


def write(folder: Path, text: str, name: str = "script.py") -> Path:
    """`folder`/`name` holds the dedented `text`."""
    path = folder / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(textwrap.dedent(text), encoding="utf-8")
    return path


def sickbay(*words: str, python: tuple[str, ...] = ()) -> list[str]:
    return [sys.executable, *python, "-m", "sickbay", *words]


def run(command: list[str], cwd: Path, stdin: bytes = b"", env: dict[str, str] | None = None) -> Outcome:
    done = subprocess.run(command, cwd=cwd, input=stdin, capture_output=True, env=env or environment(), timeout=120)
    return Outcome(done.returncode, done.stdout, ADDRESS.sub(b"0x0", done.stderr))


def both(
    folder: Path, *program: str, stdin: bytes = b"", python: tuple[str, ...] = (), env: dict[str, str] | None = None
) -> tuple[Outcome, Outcome]:
    """The outcomes of plain Python and of `sickbay run --out <folder>/run` for the same program in the same folder."""
    bare = run([sys.executable, *python, *program], folder, stdin, env)
    watched = run(sickbay("run", "--out", str(folder / "run"), *program, python=python), folder, stdin, env)
    return bare, watched


def assert_alike(bare: Outcome, watched: Outcome) -> str:
    """Exit code, stdout and stderr are the same to the byte, but for the card at the end of stderr, which is returned."""
    assert watched.stdout == bare.stdout
    assert watched.stderr[: len(bare.stderr)] == bare.stderr
    assert watched.code == bare.code
    card = watched.stderr[len(bare.stderr) :].decode()
    assert card.startswith("sickbay  "), card
    return card


def report(folder: Path) -> dict[str, Any]:
    """The report that the run in `folder`/run left."""
    content: dict[str, Any] = json.loads((folder / "run" / "report.json").read_text(encoding="utf-8"))
    return content
