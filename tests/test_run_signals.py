"""Signals reach the script as often as they would in plain Python, and the supervisor ends as the script ends."""

from __future__ import annotations

import os
import pty
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from running import environment, report, sickbay, write

COUNTS = """
    import signal, sys, time
    received = []
    for name in ("SIGINT", "SIGTERM", "SIGHUP", "SIGQUIT", "SIGUSR1", "SIGUSR2"):
        signal.signal(getattr(signal, name), lambda number, frame: received.append(signal.Signals(number).name))
    print("ready", flush=True)
    end = time.monotonic() + 20
    while time.monotonic() < end and not received:
        time.sleep(0.01)
    time.sleep(0.5)
    print(received, flush=True)
    sys.exit(7)
    """
ALL = [signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGQUIT, signal.SIGUSR1, signal.SIGUSR2]


def started(folder: Path, *command: str) -> subprocess.Popen[bytes]:
    """The command runs as the leader of its own session, and its script has said `ready`."""
    process = subprocess.Popen(
        command,
        cwd=folder,
        env=environment(),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        stdin=subprocess.DEVNULL,
        start_new_session=True,
    )
    assert process.stdout is not None
    line = process.stdout.readline()
    assert line.startswith(b"ready"), (line, process.communicate())
    return process


def children(pid: int) -> list[int]:
    return [int(word) for word in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]


def script_of(supervisor: int) -> int:
    """The script's process: the one child that runs another program than the supervisor."""
    own = Path(f"/proc/{supervisor}/cmdline").read_bytes()
    (script,) = [child for child in children(supervisor) if Path(f"/proc/{child}/cmdline").read_bytes() != own]
    return script


def gone(pid: int, within: float = 5.0) -> bool:
    end = time.monotonic() + within
    while time.monotonic() < end:
        try:
            if Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "Z":
                return True
        except OSError:
            return True
        time.sleep(0.02)
    return False


@pytest.mark.parametrize("number", ALL)
def test_a_signal_to_the_supervisor_alone_reaches_the_script_once(tmp_path: Path, number: signal.Signals) -> None:
    write(tmp_path, COUNTS)
    process = started(tmp_path, *sickbay("run", "--out", "run", "script.py"))
    process.send_signal(number)
    stdout, _ = process.communicate(timeout=30)
    assert stdout.decode() == f"{[number.name]}\n"
    assert process.returncode == 7
    assert report(tmp_path)["run"]["exit_code"] == 7


@pytest.mark.parametrize("number", ALL)
def test_a_signal_to_the_whole_group_reaches_the_script_once(tmp_path: Path, number: signal.Signals) -> None:
    write(tmp_path, COUNTS)
    process = started(tmp_path, *sickbay("run", "--out", "run", "script.py"))
    os.killpg(process.pid, number)
    stdout, _ = process.communicate(timeout=30)
    assert stdout.decode() == f"{[number.name]}\n"
    assert process.returncode == 7


def test_signals_one_after_the_other(tmp_path: Path) -> None:
    """Group, alone, group, alone: each is told apart from the one before."""
    write(tmp_path, COUNTS.replace("not received", "len(received) < 4"))
    process = started(tmp_path, *sickbay("run", "--out", "run", "script.py"))
    for send in (os.killpg, os.kill, os.killpg, os.kill):
        send(process.pid, signal.SIGINT)
        time.sleep(0.3)
    stdout, _ = process.communicate(timeout=30)
    assert stdout.decode() == f"{['SIGINT'] * 4}\n"


@pytest.mark.parametrize("number", ALL)
@pytest.mark.parametrize("send", [os.kill, os.killpg])
def test_a_script_without_handlers_dies_as_in_plain_python(tmp_path: Path, number: signal.Signals, send: object) -> None:
    write(tmp_path, "import time; print('ready', flush=True); time.sleep(30)")
    outcomes = []
    for command in ([sys.executable, "script.py"], sickbay("run", "--out", "run", "script.py")):
        process = started(tmp_path, *command)
        time.sleep(0.2)  # into the sleep, or the tracebacks differ by a column
        assert callable(send)
        send(process.pid, number)
        stdout, stderr = process.communicate(timeout=30)
        outcomes.append((process.returncode, stdout, stderr))
    assert outcomes[0][0] == outcomes[1][0] == -number
    assert outcomes[1][2].startswith(outcomes[0][2])
    content = report(tmp_path)["run"]
    assert (content["signal"], content["exit_code"], content["ended"]) == (number, 128 + number, "killed")


def test_ctrl_c_at_a_terminal_reaches_the_script_once(tmp_path: Path) -> None:
    write(tmp_path, COUNTS.replace('print("ready"', 'print("ready", [s.isatty() for s in (sys.stdin, sys.stdout, sys.stderr)]'))
    pid, terminal = pty.fork()
    if pid == 0:
        os.chdir(tmp_path)
        os.execve(sys.executable, sickbay("run", "--out", "run", "script.py"), environment(TERM="xterm"))
    seen = b""
    while b"]" not in seen:
        seen += os.read(terminal, 4096)
    assert b"ready [True, True, True]" in seen
    os.write(terminal, b"\x03")
    try:
        while chunk := os.read(terminal, 4096):
            seen += chunk
    except OSError:  # how Linux says that the terminal's other side is closed
        pass
    os.close(terminal)
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 7
    assert b"['SIGINT']" in seen
    assert b"\x1b[" in seen  # the card is coloured at a terminal


def test_an_uncaught_ctrl_c_ends_the_script_by_the_signal_and_leaves_a_report(tmp_path: Path) -> None:
    write(tmp_path, "import time\nprint('ready', flush=True)\ntime.sleep(30)\n")
    process = started(tmp_path, *sickbay("run", "--out", "run", "script.py"))
    time.sleep(0.2)
    os.killpg(process.pid, signal.SIGINT)
    _, stderr = process.communicate(timeout=30)
    assert process.returncode == -signal.SIGINT
    assert stderr.startswith(b"Traceback (most recent call last):\n") and b"\nKeyboardInterrupt\nsickbay  script.py" in stderr
    assert report(tmp_path)["run"]["ended"] == "killed"


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGSEGV, signal.SIGABRT, signal.SIGBUS])
def test_the_shell_sees_how_a_killed_script_died(tmp_path: Path, number: signal.Signals) -> None:
    write(tmp_path, "import time; print('ready', flush=True); time.sleep(30)")
    process = started(tmp_path, *sickbay("run", "--out", "run", "script.py"))
    os.kill(script_of(process.pid), number)
    process.communicate(timeout=30)
    assert process.returncode == -number
    assert report(tmp_path)["run"]["exit_code"] == 128 + number


def test_the_script_dies_with_its_supervisor(tmp_path: Path) -> None:
    write(tmp_path, "import time; print('ready', flush=True); time.sleep(60)")
    process = started(tmp_path, *sickbay("run", "--out", "run", "script.py"))
    family = children(process.pid)
    assert len(family) == 2  # the script and the witness
    process.kill()
    process.wait(timeout=10)
    assert all(gone(pid) for pid in family)
    process.communicate()


def test_nothing_is_left_behind(tmp_path: Path) -> None:
    write(tmp_path, COUNTS)
    process = started(tmp_path, *sickbay("run", "--out", "run", "script.py"))
    family = children(process.pid)
    os.killpg(process.pid, signal.SIGINT)
    time.sleep(0.2)
    family += children(process.pid)
    process.communicate(timeout=30)
    assert all(gone(pid) for pid in family)
    assert sorted(entry.name for entry in (tmp_path / "run").iterdir()) == ["report.html", "report.json"]


def test_a_launcher_that_ends_its_processes_does_not_keep_the_report_from_being_written(tmp_path: Path) -> None:
    write(tmp_path, "import time; print('ready', flush=True); time.sleep(30)")
    process = started(tmp_path, *sickbay("run", "--out", "run", "script.py"))
    for _ in range(20):
        process.send_signal(signal.SIGTERM)
        time.sleep(0.02)
    process.communicate(timeout=30)
    assert process.returncode == -signal.SIGTERM
    assert report(tmp_path)["run"]["signal"] == signal.SIGTERM


def test_ignored_signals_stay_ignored(tmp_path: Path) -> None:
    """As after nohup, and for SIGCHLD as below some container runtimes."""
    write(tmp_path, "import signal; print([signal.getsignal(s) for s in (signal.SIGHUP, signal.SIGINT, signal.SIGCHLD)])")
    for ignored in ("HUP", "HUP INT", "HUP INT CHLD"):
        outcomes = []
        for index, command in enumerate(([sys.executable, "script.py"], sickbay("run", "--out", f"run-{ignored}", "script.py"))):
            shell = ["bash", "-c", f"trap '' {ignored}; exec \"$@\"", "bash", *command]
            done = subprocess.run(shell, cwd=tmp_path, env=environment(), capture_output=True, timeout=60)
            outcomes.append((index and done.stderr, done.stdout, done.returncode))
        assert outcomes[0][1:] == outcomes[1][1:], outcomes


def test_a_script_that_ends_its_own_group_is_reported(tmp_path: Path) -> None:
    write(tmp_path, "import os, signal, time; print('ready', flush=True); os.killpg(0, signal.SIGTERM); time.sleep(30)")
    process = started(tmp_path, *sickbay("run", "--out", "run", "script.py"))
    process.communicate(timeout=30)
    assert process.returncode == -signal.SIGTERM
    assert report(tmp_path)["run"]["signal"] == signal.SIGTERM


def test_stopped_and_continued_with_its_group(tmp_path: Path) -> None:
    write(tmp_path, "import time; print('ready', flush=True); time.sleep(1); print('end')")
    process = started(tmp_path, *sickbay("run", "--out", "run", "script.py"))
    script = script_of(process.pid)
    os.killpg(process.pid, signal.SIGSTOP)
    time.sleep(0.2)
    states = [Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] for pid in (process.pid, script)]
    os.killpg(process.pid, signal.SIGCONT)
    stdout, _ = process.communicate(timeout=30)
    assert states == ["T", "T"]
    assert (process.returncode, stdout) == (0, b"end\n")
