"""Questions in a forked copy of the process: whatever becomes of the copy, an answer or a reason comes back and nothing is left behind."""

from __future__ import annotations

import os
import signal
import threading
import time
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from sickbay.exams.fork import NoAnswer, ask


def _raising(kind: type[BaseException]) -> Callable[[], None]:
    def question() -> None:
        raise kind("planted")

    return question


def _sleep() -> None:
    time.sleep(60)


def _vanish() -> None:
    os._exit(3)


def _be_killed() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def _write_much() -> str:
    print("to nobody", flush=True)
    os.write(2, b"to nobody either")
    return "x" * 1_000_000


@pytest.fixture
def clean() -> Iterator[None]:
    """No descriptor, child, signal mask or warnings filter is left behind."""

    def state() -> tuple[Any, ...]:
        mask = signal.pthread_sigmask(signal.SIG_BLOCK, [])
        return sorted(os.listdir("/proc/self/fd")), mask, list(warnings.filters), signal.getsignal(signal.SIGCHLD)

    before = state()
    yield
    assert state() == before
    with pytest.raises(ChildProcessError):
        os.waitpid(-1, os.WNOHANG)


@pytest.mark.parametrize(
    ("question", "reason"),
    [
        (_raising(RuntimeError), "RuntimeError: planted"),
        (_raising(MemoryError), "MemoryError: planted"),
        (_raising(KeyboardInterrupt), "KeyboardInterrupt: planted"),
        (_raising(SystemExit), "SystemExit: planted"),
        (lambda: object(), "not JSON serializable"),
        (lambda: {1: {2}}, "not JSON serializable"),
        (_vanish, "ended without an answer"),
        (_be_killed, "ended without an answer"),
        (_sleep, "longer than"),
    ],
)
def test_a_copy_without_an_answer(clean: None, question: Callable[[], Any], reason: str) -> None:
    began = time.monotonic()
    answer = ask(question, 0.5)
    assert isinstance(answer, NoAnswer) and reason in answer.reason
    assert answer.hung == (question is _sleep)
    assert time.monotonic() - began < 20


def test_a_copy_with_an_answer(clean: None, capfd: pytest.CaptureFixture[str]) -> None:
    assert ask(_write_much, 20) == "x" * 1_000_000
    assert capfd.readouterr() == ("", "")


def test_ctrl_c_while_a_copy_works(clean: None) -> None:
    timer = threading.Timer(0.3, lambda: os.kill(os.getpid(), signal.SIGINT))
    timer.start()
    began = time.monotonic()
    with pytest.raises(KeyboardInterrupt):
        ask(_sleep, 60)
    timer.join()
    assert time.monotonic() - began < 30


def test_handlers_of_the_script_do_not_run_in_a_copy(clean: None, tmp_path: Path) -> None:
    """A job that is told to save itself, all its processes at once, saves once."""
    saved = tmp_path / "saved"
    before = signal.signal(signal.SIGUSR1, lambda *_: saved.write_text(saved.read_text() + "x" if saved.exists() else "x"))
    try:
        answer = ask(lambda: os.kill(os.getpid(), signal.SIGUSR1) or time.sleep(5), 20)
    finally:
        signal.signal(signal.SIGUSR1, before)
    assert isinstance(answer, NoAnswer)
    assert not saved.exists()


def test_a_script_that_follows_its_children_is_not_asked(clean: None) -> None:
    seen: list[int] = []
    before = signal.signal(signal.SIGCHLD, lambda *_: seen.append(1))
    try:
        answer = ask(lambda: 1, 20)
    finally:
        signal.signal(signal.SIGCHLD, before)
    assert isinstance(answer, NoAnswer) and "SIGCHLD" in answer.reason
    assert not seen


def test_children_reaped_by_others_cost_no_answer(clean: None) -> None:
    before = signal.signal(signal.SIGCHLD, signal.SIG_IGN)
    try:
        assert ask(lambda: [1, 2], 20) == [1, 2]
    finally:
        signal.signal(signal.SIGCHLD, before)


def test_what_a_script_has_buffered_is_written_once(clean: None, tmp_path: Path) -> None:
    with (tmp_path / "log").open("w") as log:
        log.write("once\n")
        assert ask(lambda: 1, 20) == 1
    assert (tmp_path / "log").read_text() == "once\n"
