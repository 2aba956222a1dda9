"""Run a question in a forked copy of the process: whatever it does to model, RNG or globals dies with the copy.

The child shares memory copy-on-write, so nothing is copied that is not written, and the parent cannot be changed
by it: bit-identity of the watched run follows from the operating system, not from careful restoring.
"""

from __future__ import annotations

import contextlib
import faulthandler
import gc
import json
import math
import os
import select
import signal
import struct
import sys
import time
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch

_KEPT: list[Any] = []
_LENGTH = struct.Struct("<Q")
_TORCH_HANDLER = "torch.utils.data._utils.signal_handling"
_COLLECTIVES = (
    "all_reduce",
    "all_gather",
    "all_gather_into_tensor",
    "broadcast",
    "reduce_scatter_tensor",
    "all_to_all_single",
    "barrier",
    "send",
    "recv",
)


@dataclass(frozen=True)
class NoAnswer:
    """The question could not be answered, and why. `hung`: the copy had to be killed; another one would cost as much."""

    reason: str
    hung: bool = False


def can_fork() -> str:
    """ "" when questions may be asked in a forked copy here; otherwise the reason why not."""
    if not hasattr(os, "fork") or sys.platform == "darwin":
        return "this platform cannot fork a running interpreter safely"
    if torch.cuda.is_initialized():
        return "CUDA is in use and does not survive a fork"
    handler = signal.getsignal(signal.SIGCHLD)
    if callable(handler) and getattr(handler, "__module__", "") != _TORCH_HANDLER:
        return "the script handles SIGCHLD and would take our copy for a child of its own"
    return ""


def ask(question: Callable[[], Any], timeout: float) -> Any:
    """`question()`'s JSON-able answer, computed in a forked copy with one thread; NoAnswer after `timeout` seconds or any failure.

    Raises only what a signal handler of the script raises meanwhile (ctrl-C); no copy and no descriptor is left then either.
    """
    reason = can_fork()
    if reason:
        return NoAnswer(reason)
    pid, descriptors, answered = 0, [], False
    try:
        with _no_signals() as mask:
            descriptors = list(os.pipe())
            with _no_fork_warning():
                pid = os.fork()
            if pid == 0:
                _answer(question, descriptors[1], timeout, mask)
        os.close(descriptors.pop())
        answer = _collect(descriptors[0], timeout)
        answered = not (isinstance(answer, NoAnswer) and answer.hung)
        return answer
    except Exception as problem:
        return NoAnswer(f"the process could not be copied: {type(problem).__name__}: {problem}"[:500])
    finally:
        for descriptor in descriptors:
            os.close(descriptor)
        if pid:
            _reap(pid, kill=not answered)


@contextlib.contextmanager
def _no_signals() -> Iterator[set[int]]:
    """No handler of the script's runs inside, so that none can raise in a copy that is not on its own path yet; gives the mask before."""
    mask = signal.pthread_sigmask(signal.SIG_BLOCK, set(signal.valid_signals()))
    try:
        yield {int(number) for number in mask}
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, mask)


@contextlib.contextmanager
def _no_fork_warning() -> Iterator[None]:
    """Python's warning that the process has threads is not shown, and no warning of the script's is shown a second time.

    `warnings.catch_warnings` would renew them all: it makes Python forget which were shown already.
    """
    entry = ("ignore", None, DeprecationWarning, None, 0)
    warnings.filters.insert(0, entry)  # type: ignore[attr-defined]
    try:
        yield
    finally:
        with contextlib.suppress(ValueError):
            warnings.filters.remove(entry)  # type: ignore[attr-defined]


def _answer(question: Callable[[], Any], writer: int, timeout: float, mask: set[int]) -> None:
    """The child's whole life: silent, single-threaded, gone without running anybody's handlers, finalizers or buffers."""
    try:
        gc.disable()
        _own_signals(timeout, mask)
        quiet = os.open(os.devnull, os.O_RDWR)
        os.dup2(quiet, 1)
        os.dup2(quiet, 2)
        # A stream that is collected writes what it holds, and the script would find its lines twice.
        _KEPT.extend((sys.stdout, sys.stderr))
        sys.stdout = sys.stderr = os.fdopen(quiet, "w")
        torch.set_num_threads(1)
        warnings.simplefilter("ignore")
        _refuse_collectives()
        text = json.dumps({"answer": question()})
    except BaseException as problem:
        text = json.dumps({"problem": f"{type(problem).__name__}: {problem}"[:500]})
    try:
        content = text.encode()
        view = memoryview(_LENGTH.pack(len(content)) + content)
        while view:
            view = view[os.write(writer, view) :]
    finally:
        os._exit(0)


def _own_signals(timeout: float, mask: set[int]) -> None:
    """Signals end the copy as they would any program, no handler of the script's runs in it, and it dies by itself when nobody waits."""
    import resource  # not on every platform, but wherever there is a fork

    faulthandler.disable()
    resource.setrlimit(resource.RLIMIT_CORE, (0, resource.getrlimit(resource.RLIMIT_CORE)[1]))
    for number in signal.valid_signals():
        if number in (signal.SIGALRM, signal.SIGINT) or callable(signal.getsignal(number)):
            signal.signal(number, signal.SIG_DFL)
    signal.pthread_sigmask(signal.SIG_SETMASK, mask - {int(signal.SIGALRM)})
    signal.alarm(math.ceil(timeout) + 5)


def _refuse_collectives() -> None:
    """In the child, any collective raises: talking to the other ranks would disturb the real run."""
    distributed = sys.modules.get("torch.distributed")
    if distributed is None or not distributed.is_initialized():
        return

    def refuse(*_: Any, **__: Any) -> None:
        raise RuntimeError("the forward pass communicates between ranks")

    for name in _COLLECTIVES:
        if hasattr(distributed, name):
            setattr(distributed, name, refuse)


def _collect(reader: int, timeout: float) -> Any:
    """The answer as soon as all of it has come: another process forked meanwhile may hold the pipe open for ever."""
    received = bytearray()
    deadline = time.monotonic() + timeout
    while True:
        if len(received) >= _LENGTH.size:
            (length,) = _LENGTH.unpack_from(received)
            if len(received) >= _LENGTH.size + length:
                message = json.loads(received[_LENGTH.size : _LENGTH.size + length])
                return message["answer"] if "answer" in message else NoAnswer(message["problem"])
        waiting = select.poll()  # select.select refuses descriptors from 1024 on
        waiting.register(reader, select.POLLIN)
        if not waiting.poll(max(0.0, deadline - time.monotonic()) * 1000):
            return NoAnswer(f"it took longer than {timeout:.0f} s", hung=True)
        chunk = os.read(reader, 1 << 16)
        if not chunk:
            return NoAnswer("the copy of the process ended without an answer")
        received += chunk


def _reap(pid: int, kill: bool) -> None:
    """The copy is gone and no child of the script's any more. It may be gone already where the script reaps all its children."""
    with contextlib.suppress(OSError):
        if kill:
            os.kill(pid, signal.SIGKILL)
        try:
            os.waitpid(pid, 0)
        except BaseException:
            os.kill(pid, signal.SIGKILL)
            os.waitpid(pid, 0)
            raise
