"""Run a question in a forked copy of the process: whatever it does to model, RNG or globals dies with the copy.

The child shares memory copy-on-write, so nothing is copied that is not written, and the parent cannot be changed
by it: bit-identity of the watched run follows from the operating system, not from careful restoring.
"""

from __future__ import annotations

import contextlib
import json
import os
import select
import signal
import sys
import time
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch


@dataclass(frozen=True)
class NoAnswer:
    """The question could not be answered, and why."""

    reason: str


def can_fork() -> str:
    """"" when questions may be asked in a forked copy here; otherwise the reason why not."""
    if not hasattr(os, "fork") or sys.platform == "darwin":
        return "this platform cannot fork a running interpreter safely"
    if torch.cuda.is_initialized():
        return "CUDA is in use and does not survive a fork"
    return ""


def ask(question: Callable[[], Any], timeout: float) -> Any:
    """`question()`'s JSON-able answer, computed in a forked copy with one thread; NoAnswer after `timeout` seconds or any failure."""
    reason = can_fork()
    if reason:
        return NoAnswer(reason)
    reader, writer = os.pipe()
    sys.stdout.flush()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        pid = os.fork()
    if pid == 0:
        _answer(question, writer)
    os.close(writer)
    try:
        return _collect(reader, pid, timeout)
    finally:
        os.close(reader)


def _answer(question: Callable[[], Any], writer: int) -> None:
    """The child's whole life: silent, single-threaded, gone without running anybody's exit handlers."""
    try:
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGALRM):
            with contextlib.suppress(Exception):
                signal.signal(number, signal.SIG_DFL)
        signal.setitimer(signal.ITIMER_REAL, 0)
        quiet = os.open(os.devnull, os.O_RDWR)
        os.dup2(quiet, 1)
        os.dup2(quiet, 2)
        sys.stdout = sys.stderr = open(os.devnull, "w")
        torch.set_num_threads(1)
        warnings.simplefilter("ignore")
        _refuse_collectives()
        text = json.dumps({"answer": question()})
    except BaseException as problem:
        text = json.dumps({"problem": f"{type(problem).__name__}: {problem}"[:500]})
    try:
        view = memoryview(text.encode())
        while view:
            view = view[os.write(writer, view) :]
    finally:
        os._exit(0)


def _refuse_collectives() -> None:
    """In the child, any collective raises: talking to the other ranks would disturb the real run."""
    distributed = sys.modules.get("torch.distributed")
    if distributed is None or not distributed.is_initialized():
        return

    def refuse(*_: Any, **__: Any) -> None:
        raise RuntimeError("the forward pass communicates between ranks")

    for name in ("all_reduce", "all_gather", "all_gather_into_tensor", "broadcast", "reduce_scatter_tensor", "all_to_all_single", "barrier", "send", "recv"):
        if hasattr(distributed, name):
            setattr(distributed, name, refuse)


def _collect(reader: int, pid: int, timeout: float) -> Any:
    chunks: list[bytes] = []
    deadline = time.monotonic() + timeout
    while True:
        ready, _, _ = select.select([reader], [], [], max(0.0, deadline - time.monotonic()))
        if not ready:
            os.kill(pid, signal.SIGKILL)
            os.waitpid(pid, 0)
            return NoAnswer(f"it took longer than {timeout:.0f} s")
        chunk = os.read(reader, 1 << 16)
        if not chunk:
            break
        chunks.append(chunk)
    _, status = os.waitpid(pid, 0)
    if not chunks:
        return NoAnswer(f"the copy of the process ended with status {status}")
    message = json.loads(b"".join(chunks))
    return message["answer"] if "answer" in message else NoAnswer(message["problem"])
