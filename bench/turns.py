"""Processes that take turns: each does a piece of work when it is asked, so that a machine that grows slower does so for all.

The child reads a request a line on stdin and answers a line on stdout, both JSON; what else it prints goes to stderr.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any

ROOT = Path(__file__).resolve().parent.parent


class Player:
    """A child process. Where it dies its last words are the error."""

    def __init__(
        self, name: str, script: Path, *arguments: str, under: Sequence[str] = (), environment: dict[str, str] | None = None
    ) -> None:
        """`python *under script *arguments` has been started."""
        self.name = name
        self._process = subprocess.Popen(
            [sys.executable, *under, str(script), *arguments],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            env={**os.environ, "PYTHONPATH": str(ROOT), "HF_HUB_OFFLINE": "1", **(environment or {})},
            text=True,
        )

    def ask(self, **request: Any) -> Any:
        """The child's answer. Raises RuntimeError where it died."""
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        try:
            self._process.stdin.write(json.dumps(request) + "\n")
            self._process.stdin.flush()
        except BrokenPipeError:
            pass
        answer = self._process.stdout.readline()
        if not answer:
            raise RuntimeError(f"{self.name} ended with exit status {self._process.wait()} at {request}; its error stands above")
        return json.loads(answer)

    def __enter__(self) -> Player:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._process.kill()
        self._process.wait()
        for pipe in (self._process.stdin, self._process.stdout):
            if pipe is not None:
                pipe.close()


class Requests:
    """The child's side: requests come in, answers go out; stdout is the parent's, so prints are sent to stderr."""

    def __init__(self) -> None:
        self._answers = os.fdopen(os.dup(1), "w")
        os.dup2(2, 1)

    def __iter__(self) -> Iterator[dict[str, Any]]:
        for line in sys.stdin:
            yield json.loads(line)

    def answer(self, value: Any) -> None:
        print(json.dumps(value), file=self._answers, flush=True)
