"""The parent of the watched script: starts it, passes signals on, outlives it, and in the end dies of what the script died of.

It shares the script's terminal, process group and standard streams, and reads none of them. Every signal that could end it is
blocked and taken from the queue, so no handler runs and the script inherits exactly the dispositions it would have had.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import signal
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from sickbay.core.errors import UsageError

PASSED_ON = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGQUIT, signal.SIGUSR1, signal.SIGUSR2)
FROM_THE_KEYBOARD = (signal.SIGINT, signal.SIGQUIT)
LINUX = sys.platform == "linux"
PR_SET_PDEATHSIG = 1  # linux/prctl.h
# A signal to a process group reaches its members one after the other; this is ample for the last of them to have it.
SECONDS_FOR_A_GROUP = 0.02


@dataclass(frozen=True)
class Ended:
    """How the script ended. `exit_code`: as the shell shows it, 128 + n after signal n; `signal`: 0 if none; `started`: Unix seconds."""

    exit_code: int
    signal: int
    started: float
    seconds: float
    out_of_memory: bool = False


def supervise(command: Sequence[str], environment: Mapping[str, str]) -> Ended:
    """The command has run to its end in this process group; signals sent to this process alone were passed on to it.

    On return the keyboard's signals work again; the others stay blocked, since a launcher that ends its processes (torchrun,
    Slurm, a container) must not keep the report from being written. Raises UsageError if the command cannot be started.
    """
    kills_before = _out_of_memory_kills()
    mask = signal.pthread_sigmask(signal.SIG_BLOCK, {*PASSED_ON, signal.SIGCHLD})
    witness = _Witness()
    started, clock = time.time(), time.monotonic()
    try:
        process = _start(command, environment, mask)
        status = _wait(process.pid, witness)
        process.returncode = os.waitstatus_to_exitcode(status)
    finally:
        witness.dismiss()
        # What arrived for a script that is gone has nobody left to take it.
        while pending := signal.sigpending() & {*PASSED_ON, signal.SIGCHLD}:
            signal.sigwait(pending)
        signal.pthread_sigmask(signal.SIG_UNBLOCK, {*FROM_THE_KEYBOARD, signal.SIGCHLD} - set(mask))
    seconds = time.monotonic() - clock
    if os.WIFSIGNALED(status):
        number = os.WTERMSIG(status)
        killed_for_memory = number == signal.SIGKILL and _out_of_memory_kills() > kills_before
        return Ended(128 + number, number, started, seconds, killed_for_memory)
    return Ended(os.WEXITSTATUS(status), 0, started, seconds)


def die_by(number: int) -> None:
    """This process is gone by signal `number`, as the script is. Returns only where that cannot be (as process 1 of a container)."""
    import resource

    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(OSError, ValueError, AttributeError):
            stream.flush()
    # The script has left its core file; a second one, of the supervisor, would only hide it.
    resource.setrlimit(resource.RLIMIT_CORE, (0, resource.getrlimit(resource.RLIMIT_CORE)[1]))
    with contextlib.suppress(OSError, ValueError):  # SIGKILL has no other disposition
        signal.signal(number, signal.SIG_DFL)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, {number})
    os.kill(os.getpid(), number)
    time.sleep(0.1)


def _start(command: Sequence[str], environment: Mapping[str, str], mask: set[signal.Signals] | set[int]) -> subprocess.Popen[bytes]:
    supervisor = os.getpid()
    libc = ctypes.CDLL(None)
    # Where SIGCHLD is ignored the kernel throws a child's status away before it can be read.
    on_child = signal.signal(signal.SIGCHLD, lambda number, frame: None)

    def in_the_child() -> None:
        if LINUX:
            libc.prctl(PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
        if os.getppid() != supervisor:  # it died before the line above took effect
            os._exit(1)
        if on_child == signal.SIG_IGN:
            signal.signal(signal.SIGCHLD, signal.SIG_IGN)
        signal.pthread_sigmask(signal.SIG_SETMASK, mask)

    try:
        # Descriptors beyond the three standard ones belong to the script too if the shell opened them (`3<file`).
        return subprocess.Popen(command, env=dict(environment), close_fds=False, preexec_fn=in_the_child)
    except OSError as problem:
        raise UsageError(f"{command[0]} could not be started: {problem.strerror or problem}") from None


def _wait(script: int, witness: _Witness) -> int:
    """The wait status of process `script`, once it has ended."""
    while True:
        ended, status = os.waitpid(script, os.WNOHANG)
        if ended == script:
            return status
        number, sender = _next_signal()
        if number == signal.SIGCHLD:
            continue
        if not witness.saw(number) and sender != script:
            os.kill(script, number)
        witness.forget()


def _next_signal() -> tuple[int, int]:
    """The next signal sent to this process and, where the system tells it, the process that sent it (else 0)."""
    signals = {*PASSED_ON, signal.SIGCHLD}
    if LINUX:
        received = signal.sigwaitinfo(signals)
        return received.si_signo, received.si_pid
    return signal.sigwait(signals), 0


class _Witness:
    """A silent process of the same group: a signal that it has too was sent to the whole group, so the script has it already.

    Without it a ctrl-C would reach the script twice, or a launcher's TERM not at all: both look alike to the supervisor.
    Only Linux shows what is pending for another process; elsewhere the keyboard's signals are taken to be the group's.
    """

    def __init__(self) -> None:
        self._pid = _silent_process() if LINUX else 0

    def saw(self, number: int) -> bool:
        """True if signal `number` has reached the witness since it was started."""
        if not LINUX:
            return number in FROM_THE_KEYBOARD
        time.sleep(SECONDS_FOR_A_GROUP)
        return bool(self._pending() >> (number - 1) & 1)

    def forget(self) -> None:
        """Nothing is pending any more: a fresh witness stands in if the old one had seen anything or is gone."""
        if LINUX and (self._pending() or os.waitpid(self._pid, os.WNOHANG)[0]):
            self.dismiss()
            self._pid = _silent_process()

    def dismiss(self) -> None:
        """The witness has ended."""
        if LINUX:
            with contextlib.suppress(ProcessLookupError, ChildProcessError):
                os.kill(self._pid, signal.SIGKILL)
                os.waitpid(self._pid, 0)

    def _pending(self) -> int:
        try:
            with open(f"/proc/{self._pid}/status", encoding="ascii", errors="replace") as status:
                return next((int(line.split()[1], 16) for line in status if line.startswith("ShdPnd:")), 0)
        except OSError:
            return 0


def _silent_process() -> int:
    """A process that does nothing until it is killed or this one is gone; the signals blocked here are blocked there."""
    supervisor = os.getpid()
    pid = os.fork()
    if pid == 0:
        try:
            ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
            # Held open here, a pipe would not reach its end when the script closes it.
            for descriptor in os.listdir("/proc/self/fd"):
                with contextlib.suppress(OSError):
                    os.close(int(descriptor))
            while os.getppid() == supervisor:
                signal.pause()
        finally:
            os._exit(0)
    return pid


def _out_of_memory_kills() -> int:
    """How often the kernel has killed a process of this control group for want of memory; 0 where that is not told."""
    try:
        with open("/proc/self/cgroup", encoding="utf-8") as groups:
            path = next((line.strip().partition("::")[2] for line in groups if line.startswith("0::")), "")
        with open(f"/sys/fs/cgroup{path}/memory.events", encoding="utf-8") as events:
            return next((int(line.split()[1]) for line in events if line.startswith("oom_kill ")), 0)
    except (OSError, ValueError):
        return 0
