"""The record survives what happens to the process, the disk and the file system."""

from __future__ import annotations

import math
import os
import signal
import sqlite3
import subprocess
import sys
import textwrap
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from sickbay.core import record
from sickbay.core.errors import RecordError
from sickbay.core.reader import chart_of, load_chart
from sickbay.core.record import RecordWriter

NAN = float("nan")
ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture
def writer(tmp_path: Path) -> Iterator[RecordWriter]:
    made = RecordWriter(tmp_path)
    yield made
    made.close()


def child(code: str, *argv: object) -> subprocess.Popen[str]:
    """A real process running `code`."""
    command = [sys.executable, "-c", textwrap.dedent(code), *map(str, argv)]
    return subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)


KILLED = """
    import os, signal, sys
    from sickbay.core.record import RecordWriter
    writer = RecordWriter(sys.argv[1])
    writer.fact("device", "cpu")
    for step in range(3000):
        writer.read("loss", step)
        writer.table("weight_norm", ("a", "b"), [step, step + 1])
        writer.end_step()
    writer.read("exception", 1, note={"type": "KeyError"})
    writer.read("loss", 3000)
    writer.flush()
    writer.read("loss", -1)  # of a step that never ends
    os.kill(os.getpid(), signal.SIGKILL)
"""


def test_a_killed_run_is_readable_to_its_last_step(tmp_path: Path) -> None:
    assert child(KILLED, tmp_path).wait(60) == -signal.SIGKILL
    assert (tmp_path / "record-0.sqlite-wal").stat().st_size > 0
    for _ in range(2):  # reading changes nothing
        chart = load_chart(tmp_path)
        assert chart["loss"].values == [float(step) for step in range(3001)]
        assert chart.table("weight_norm").values.tolist() == [[step, step + 1] for step in range(3000)]
        assert chart["exception"][0].note == {"type": "KeyError"} and chart.facts["device"] == "cpu"


def test_a_record_is_readable_while_another_process_writes_it(tmp_path: Path) -> None:
    code = """
        import sys, time
        from sickbay.core.record import RecordWriter
        writer = RecordWriter(sys.argv[1])
        print("go", flush=True)
        ends = time.monotonic() + 20
        while time.monotonic() < ends:
            writer.read("loss", writer.step)
            writer.table("weight_norm", ("a",), [writer.step])
            writer.end_step()
        print(writer.stopped)
    """
    process = child(code, tmp_path)
    try:
        assert process.stdout is not None and process.stdout.readline() == "go\n"
        seen = [0]
        while len(seen) < 6:
            chart = load_chart(tmp_path)
            steps = chart["loss"].steps
            assert steps == list(range(len(steps))) and chart["loss"].values == steps
            assert chart.table("weight_norm").steps.tolist() == steps  # one snapshot: nothing half-written
            if len(steps) > seen[-1]:
                seen.append(len(steps))
    finally:
        process.kill()
        process.wait()
        assert process.stdout is not None
        process.stdout.close()


def test_a_forked_child_neither_writes_nor_closes(writer: RecordWriter) -> None:
    code = """
        import os, sys
        from sickbay.core.record import RecordWriter
        from sickbay.core.reader import chart_of, load_chart
        from sickbay.core.errors import RecordError
        writer = RecordWriter(sys.argv[1])
        writer.read("loss", 1)
        writer.end_step()
        writer.read("loss", 2)
        if os.fork() == 0:
            for _ in range(10):
                writer.read("loss", 99)
                writer.read("exception", 1)
                writer.table("weight_norm", ("a",), [1])
                writer.fact("child", True)
                writer.unobserved("loss", "child")
                writer.end_step()
            writer.flush()
            writer.close()
            try:
                chart_of(writer)
                os._exit(3)
            except RecordError:
                sys.exit(0)  # with all of the interpreter's clean-up
        assert os.waitstatus_to_exitcode(os.wait()[1]) == 0
        assert os.path.getsize(sys.argv[1] + "/record-0.sqlite-wal") > 0
        writer.end_step()
        writer.read("loss", 3)
        writer.end_step()
        print(load_chart(sys.argv[1])["loss"].values, writer.stopped, "child" in load_chart(sys.argv[1]).facts)
    """
    process = child(code, writer.folder / "forked")
    assert process.communicate(timeout=60)[0] == "[1.0, 2.0, 3.0]  False\n"


def test_several_threads_may_read(writer: RecordWriter) -> None:
    def work(name: str) -> None:
        for step in range(500):
            writer.read("activation_rms", step, where=name)
            writer.table("weight_norm", (name,), [step])
            writer.end_step()

    threads = [threading.Thread(target=work, args=(f"h.{i}",)) for i in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    chart = chart_of(writer)
    assert writer.step == 2000 and writer.stopped == ""
    for i in range(4):
        assert sorted(chart["activation_rms"].at(f"h.{i}").values) == list(range(500))
    assert chart.table("weight_norm").counts.sum() == 2000


def test_a_signal_handler_may_come_in_at_any_time(writer: RecordWriter) -> None:
    def handler(*_: object) -> None:
        writer.read("grad_norm", 1)
        writer.end_step()

    before = signal.signal(signal.SIGUSR1, handler)
    over = threading.Event()

    def interrupt() -> None:
        while not over.wait(0.0005):
            os.kill(os.getpid(), signal.SIGUSR1)

    interrupter = threading.Thread(target=interrupt)
    interrupter.start()
    try:
        ends = time.monotonic() + 1
        written = 0
        while time.monotonic() < ends and written < 20_000:  # a much longer record is merged
            writer.read("loss", written)
            writer.end_step()
            written += 1
    finally:
        over.set()
        interrupter.join()
        signal.signal(signal.SIGUSR1, before)
    chart = chart_of(writer)
    assert writer.stopped == "" and chart["loss"].values == list(range(written))
    assert len(chart["grad_norm"]) > 10 and chart.unobserved == {}


def test_a_folder_that_cannot_be_made_leaves_a_chart_in_memory(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    writer = RecordWriter(tmp_path / "file" / "run")
    writer.fact("device", "cpu")
    writer.unobserved("dead_units", "no ReLU")
    for step in range(3000):
        writer.read("loss", step, note={"x": NAN} if step == 0 else None)
        writer.table("weight_norm", ("a",), [1.0])
        writer.end_step()
    writer.read("exception", 1, note={"type": "E"})
    chart = chart_of(writer)
    assert writer.step == 3000 and writer.stopped.startswith("step 0: ") and "Not a directory" in writer.stopped
    assert chart["loss"].values == [*range(1000), *range(2000, 3000)] and math.isnan(chart["loss"][0].note["x"])
    assert chart["exception"][0].note == {"type": "E"} and chart.facts["device"] == "cpu"
    assert chart.facts["recording_stopped"] == writer.stopped and chart.unobserved == {"dead_units": "no ReLU"}
    writer.close()


def test_a_full_disk_stops_recording_and_says_when_and_why(tmp_path: Path) -> None:
    code = """
        import resource, sys
        from sickbay.core.record import RecordWriter
        from sickbay.core.reader import chart_of
        writer = RecordWriter(sys.argv[1])
        resource.setrlimit(resource.RLIMIT_FSIZE, (300_000, 300_000))
        for step in range(4000):
            writer.read("loss", step)
            writer.read("grad_norm", step, note={"x": step})
            writer.end_step()
        writer.read("exception", 1)
        chart = chart_of(writer)
        steps = chart["loss"].steps
        print(writer.stopped)
        once = len(set(steps)) == len(steps)
        print(steps[0], once, steps[-1], len(chart["exception"]), chart.facts["recording_stopped"] == writer.stopped)
        writer.close()
    """
    process = child(code, tmp_path)
    reason, rest = process.communicate(timeout=60)[0].splitlines()
    assert process.returncode == 0 and rest == "0 True 3999 1 True"
    step = int(reason.partition(":")[0].removeprefix("step "))
    assert 0 < step < 4000 and ("full" in reason or "I/O" in reason)
    assert (tmp_path / "record-0.stopped").read_text().strip() == reason
    chart = load_chart(tmp_path)
    assert chart["loss"].steps == list(range(step)) and chart.facts["recording_stopped"] == reason


def test_without_wal_recording_goes_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    plain = sqlite3.connect
    monkeypatch.setattr(sqlite3, "connect", lambda path, **more: plain(f"file:{path}?vfs=unix-dotfile", uri=True, **more))
    writer = RecordWriter(tmp_path)
    for step in range(20):
        writer.read("loss", step)
        writer.end_step()
    assert writer.stopped == "" and not (tmp_path / "record-0.sqlite-wal").exists()
    assert writer.connection is not None and writer.connection.execute("PRAGMA journal_mode").fetchone() == ("truncate",)
    writer.close()
    monkeypatch.undo()
    assert load_chart(tmp_path)["loss"].values == list(range(20))


def test_a_reader_in_the_way_only_delays_the_record(tmp_path: Path) -> None:
    writer = RecordWriter(tmp_path)
    blocker = sqlite3.connect(tmp_path / "record-0.sqlite", isolation_level=None)
    blocker.execute("BEGIN IMMEDIATE")
    tries: list[str] = []
    assert writer.connection is not None
    writer.connection.set_trace_callback(tries.append)
    for step in range(1000):
        writer.read("loss", step)
        writer.end_step()
    writer.connection.set_trace_callback(None)
    assert 0 < len(tries) < 200  # it does not wait at every step
    assert load_chart(tmp_path)["loss"].steps == []
    blocker.execute("ROLLBACK")
    blocker.close()
    writer.read("loss", 1000)
    writer.flush()
    assert writer.stopped == "" and load_chart(tmp_path)["loss"].steps == list(range(1001))
    writer.close()


def test_a_file_locked_for_good_stops_recording(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(record, "MAX_BACKLOG", 5)
    writer = RecordWriter(tmp_path)
    blocker = sqlite3.connect(tmp_path / "record-0.sqlite", isolation_level=None)
    blocker.execute("BEGIN IMMEDIATE")
    for step in range(9):
        writer.read("loss", step)
        writer.end_step()
    blocker.execute("ROLLBACK")
    blocker.close()
    assert "locked" in writer.stopped and chart_of(writer)["loss"].steps == list(range(9))
    writer.close()


def test_a_disk_too_full_to_say_so_is_still_reported(writer: RecordWriter) -> None:
    writer.step = 6
    writer.read("loss", 1)
    writer.end_step()
    (writer.folder / "record-0.stopped").write_text("")
    assert load_chart(writer.folder).facts["recording_stopped"].startswith("after step 6: no space was left")


def test_a_record_left_behind_is_kept_aside_and_one_in_use_is_not_touched(tmp_path: Path) -> None:
    assert child(KILLED, tmp_path).wait(60) == -signal.SIGKILL
    first = RecordWriter(tmp_path)
    first.read("loss", 5)
    first.end_step()
    assert load_chart(tmp_path)["loss"].values == [5.0]
    assert (tmp_path / "record-0.before-1.sqlite").exists()
    second = RecordWriter(tmp_path)
    second.read("loss", 6)
    second.end_step()
    assert f"being written by process {os.getpid()}" in second.stopped and chart_of(second)["loss"].values == [6.0]
    second.close()
    first.close()
    third = RecordWriter(tmp_path)
    assert third.stopped == "" and (tmp_path / "record-0.before-2.sqlite").exists()
    third.close()


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        (None, b"", "no record-<rank>.sqlite"),
        ("record-0.stopped", b"step 0: Read-only file system", "recording stopped at step 0: Read-only file system"),
        ("record-0.sqlite", b"", r"record-0\.sqlite: the record cannot be read"),
        ("record-0.sqlite", b"not a database" * 500, r"record-0\.sqlite: the record cannot be read \(DatabaseError.*run the script again"),
    ],
)
def test_what_is_no_record_is_refused_by_name(tmp_path: Path, name: str | None, content: bytes, message: str) -> None:
    if name:
        (tmp_path / name).write_bytes(content)
    with pytest.raises(RecordError, match=message):
        load_chart(tmp_path)


def test_damage_is_refused_by_name(tmp_path: Path) -> None:
    writer = RecordWriter(tmp_path)
    for step in range(2000):
        writer.read("loss", step, note={"x": step})
        writer.end_step()
    writer.close()
    path = tmp_path / "record-0.sqlite"
    content = bytearray(path.read_bytes())
    content[20_000:-4096] = b"\xff" * (len(content) - 24_096)
    path.write_bytes(content)
    with pytest.raises(RecordError, match=r"record-0\.sqlite: the record cannot be read"):
        load_chart(tmp_path)
    with pytest.raises(RecordError, match="no such folder"):
        load_chart(tmp_path / "nowhere")
