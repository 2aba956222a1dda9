"""Whatever breaks inside sickbay reaches no script: the training ends bit for bit alike, and the report names what broke."""

from __future__ import annotations

import contextlib
import json
import os
import random
import sqlite3
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from early_naps import sleep_after
from noninterference_models import ByHand, batches, digest, loss_of, seed
from torch import nn

import sickbay
from sickbay import examiner
from sickbay.core import database
from sickbay.core import record as record_module
from sickbay.core.record import RecordWriter
from sickbay.doctor import PROBES, Watch
from sickbay.exams import fork
from sickbay.exams.fork import NoAnswer, ask
from sickbay.patient import Patient
from sickbay.probes import loop as loop_module
from sickbay.probes import nap
from sickbay.probes.loop import Loop
from sickbay.probes.losses import Losses
from sickbay.probes.nap import Nap
from sickbay.probes.outermost import Outermost

ERRORS = (RuntimeError, MemoryError, KeyError, AssertionError, RecursionError, OSError, TypeError)


def train() -> str:
    """Every event that a watch can be told happens at least once; the hash of all that is left."""
    seed()
    model = ByHand(dropout=0.1)
    model.unused = nn.Parameter(torch.ones(2))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01, momentum=0.9)
    scaler = torch.amp.GradScaler("cpu", init_scale=64.0)
    losses = []
    for step, (ids, targets) in enumerate(batches(6)):
        optimizer.zero_grad()
        loss = loss_of(model, ids, targets)
        if step < 2:
            scaler.scale(loss).backward()
            if step == 1:  # a step that the scaler leaves out
                next(p.grad for p in model.parameters() if p.grad is not None).view(-1)[0] = float("inf")
            scaler.unscale_(optimizer)
            nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            scaler.step(optimizer)
            scaler.update()
        elif step < 4:
            (loss * (float("nan") if step == 3 else 1.0)).backward()
            optimizer.step()
            model.load_state_dict({key: value.nan_to_num(0.1) for key, value in model.state_dict().items()})
        else:

            def closure(ids: torch.Tensor = ids, targets: torch.Tensor = targets) -> torch.Tensor:
                optimizer.zero_grad()
                again = loss_of(model, ids, targets)
                again.backward()
                return again

            optimizer.step(closure)
        losses.append(loss.item())
        model.eval()
        with torch.no_grad():
            losses.append(loss_of(model, ids, targets).item())
        model.train()
    sound = ByHand()
    other = torch.optim.SGD(sound.parameters(), lr=0.01)
    for step, (ids, targets) in enumerate(batches(24)):  # most of them are slept through, and some are woken from
        other.zero_grad()
        loss = loss_of(sound, ids, targets)
        (loss + 0 * loss if step % 4 == 3 else loss).backward()
        other.step()
    weight = torch.randn(3, requires_grad=True)
    losses.append(torch.func.grad(lambda w: (w**3).sum())(weight.detach()).tolist())
    torch.compile(lambda x: x, backend="eager")
    states = [random.getstate(), list(np.random.get_state()), torch.get_rng_state()]
    return digest(
        [
            losses,
            model.state_dict(),
            sound.state_dict(),
            optimizer.state_dict(),
            [p.grad for p in model.parameters()],
            scaler.state_dict(),
            *states,
        ]
    )


@pytest.fixture(scope="module")
def undisturbed() -> str:
    return train()


@pytest.fixture(autouse=True)
def early_naps(monkeypatch: pytest.MonkeyPatch) -> None:
    """Steps may be slept through after eight."""
    sleep_after(8, monkeypatch.setattr)


@pytest.fixture
def no_questions(monkeypatch: pytest.MonkeyPatch) -> None:
    """Exams answer nothing, at once."""
    for module, name in EXAMS:
        monkeypatch.setattr(module, name, lambda *_, **__: NoAnswer("not asked"))


EXAMS = (
    (examiner.masks, "examine"),
    (examiner.internals, "examine"),
    (examiner.nonfinite, "locate"),
    (examiner.missing_gradient, "examine"),
)


class Planted:
    """Raises `kind` from its `first`-th call on; `calls` counts them."""

    def __init__(self, kind: type[BaseException], first: int = 1) -> None:
        self.kind, self.first, self.calls = kind, first, 0

    def __call__(self, *_: Any, **__: Any) -> Any:
        self.calls += 1
        if self.calls >= self.first:
            raise self.kind("planted")
        return None


def watched(folder: Path, plant: Callable[[Watch], None] | None = None) -> tuple[str, Watch]:
    """The hash of a watched training that fails at its end, after `plant` was given the watch; nothing but that failure comes out."""
    result = ""
    with contextlib.suppress(ZeroDivisionError), sickbay.watch(out=folder) as doctor:
        if plant is not None:
            plant(doctor)
        result = train()
        raise ZeroDivisionError
    return result, doctor


def problems_in(folder: Path) -> list[dict[str, Any]]:
    """The problems that the report names."""
    content = json.loads((folder / "report.json").read_text(encoding="utf-8"))
    found: list[dict[str, Any]] = content.get("problems", [])
    return found


# What the training below does not cause: leaks, samples, schedules written as functions, shapes that outgrow their operands.
RARE = frozenset(("graphs_kept", "memory_grows", "schedule_function", "generating", "outgrown", "from_outside"))


def listeners_of_a_watch() -> list[tuple[str, str, int]]:
    """(event, probe's class or function, place among the event's listeners) of every listener there is."""
    import tempfile

    with tempfile.TemporaryDirectory() as folder, sickbay.watch(out=folder) as doctor:
        return [
            (event, getattr(probe, "__name__", type(probe).__name__), place)
            for event, heard in doctor._loop._listeners.items()
            for place, (probe, _) in enumerate(heard)
            if event not in RARE
        ]


LISTENERS = listeners_of_a_watch()


@pytest.mark.parametrize(("event", "probe", "place"), LISTENERS, ids=[f"{event}-{probe}-{place}" for event, probe, place in LISTENERS])
def test_a_listener_that_raises(
    tmp_path: Path, undisturbed: str, no_questions: None, event: str, probe: str, place: int, request: pytest.FixtureRequest
) -> None:
    planted = Planted(ERRORS[LISTENERS.index((event, probe, place)) % len(ERRORS)])

    def plant(doctor: Watch) -> None:
        heard = doctor._loop._listeners[event]
        heard[place] = (heard[place][0], planted)
        doctor._loop._told.clear()

    result, _ = watched(tmp_path / "run", plant)
    assert planted.calls == 1, "its event came, and then the probe was left out"
    assert result == undisturbed
    named = [(problem["probe"], problem["event"]) for problem in problems_in(tmp_path / "run")]
    assert named == [(probe, event)]
    assert "planted" in problems_in(tmp_path / "run")[0]["error"]


def test_there_are_listeners_of_every_probe() -> None:
    assert len(LISTENERS) > 30
    assert {"Losses", "Gradients", "Order", "Updates", "Parameters", "Batches", "Scaling", "Examiner"} <= {
        probe for _, probe, _ in LISTENERS
    }


@pytest.mark.parametrize("event", sorted({event for event, _, _ in LISTENERS} - {"failed", "finish", "round_end"}))
def test_ctrl_c_inside_reaches_the_script(tmp_path: Path, no_questions: None, event: str) -> None:
    before = dict(nn.modules.module._global_forward_pre_hooks)
    with pytest.raises(KeyboardInterrupt), sickbay.watch(out=tmp_path / "run") as doctor:
        doctor._loop._listeners[event].insert(0, ("nobody", Planted(KeyboardInterrupt)))
        train()
    assert dict(nn.modules.module._global_forward_pre_hooks) == before
    assert json.loads((tmp_path / "run" / "report.json").read_text())["run"]["ended"] == "failed"


INTERNALS: list[tuple[Any, str]] = [
    *((Patient, name) for name in ("admit", "spend", "add_loss", "forget_step")),
    *((Loop, name) for name in ("end_step", "_end_round", "_forward_begins", "_forward_ends")),
    (Losses, "_capture"),
    *((Outermost, name) for name in ("_stand_in", "_restore")),
    *((loop_module, name) for name in ("tensors_in", "closure_of")),
    *((Nap, name) for name in ("forward", "lost", "backward", "step", "call", "loss")),
    *((nap, name) for name in ("look", "habit_of", "Nap", "norms_of")),
]


@pytest.mark.parametrize(("owner", "name"), INTERNALS, ids=[f"{owner.__name__.rpartition('.')[2]}.{name}" for owner, name in INTERNALS])
@pytest.mark.parametrize("first", [1, 3])
def test_an_inner_part_that_raises(
    tmp_path: Path, undisturbed: str, no_questions: None, monkeypatch: pytest.MonkeyPatch, owner: Any, name: str, first: int
) -> None:
    original, calls = getattr(owner, name), []

    def failing(*args: Any, **kwargs: Any) -> Any:
        calls.append(name)
        if len(calls) >= first and len(calls) < first + 3:
            raise ERRORS[first]("planted")
        return original(*args, **kwargs)

    monkeypatch.setattr(owner, name, failing)
    result, _ = watched(tmp_path / "run")
    assert len(calls) >= first
    assert result == undisturbed
    assert any("planted" in problem["error"] for problem in problems_in(tmp_path / "run"))


@pytest.mark.parametrize("method", ["read", "table", "end_step", "unobserved", "fact", "close"])
def test_a_record_writer_that_raises(
    tmp_path: Path, undisturbed: str, no_questions: None, monkeypatch: pytest.MonkeyPatch, method: str
) -> None:
    """Of `fact` all calls but the one that names problems: those can only be told by the one who watched."""
    original, calls = getattr(RecordWriter, method), []

    def failing(self: RecordWriter, *args: Any, **kwargs: Any) -> Any:
        if args[:1] == ("problems",):
            return original(self, *args, **kwargs)
        calls.append(args)
        raise OSError("planted")

    def plant(_: Watch) -> None:
        monkeypatch.setattr(RecordWriter, method, failing)

    result, doctor = watched(tmp_path / "run", plant)
    monkeypatch.undo()
    assert calls
    assert result == undisturbed
    if method not in ("close", "unobserved"):  # no step of the training itself writes by these
        assert any("planted" in problem["error"] for problem in (*doctor._loop.problems, *problems_in(tmp_path / "run")))


@pytest.mark.parametrize("method", ["read", "table", "end_step", "unobserved", "fact", "flush", "close"])
@pytest.mark.parametrize("call", [1, 2, 5])
def test_one_call_of_the_record_writer_that_raises(
    tmp_path: Path, undisturbed: str, no_questions: None, monkeypatch: pytest.MonkeyPatch, method: str, call: int
) -> None:
    original, calls = getattr(RecordWriter, method), []

    def failing(self: RecordWriter, *args: Any, **kwargs: Any) -> Any:
        calls.append(args)
        if len(calls) == call:
            raise MemoryError("planted")
        return original(self, *args, **kwargs)

    monkeypatch.setattr(RecordWriter, method, failing)
    with contextlib.suppress(MemoryError):  # from the constructor of Watch, before anything is watched
        result, _ = watched(tmp_path / "run")
        assert result == undisturbed


@pytest.mark.parametrize(
    ("owner", "name", "error"),
    [
        (RecordWriter, "_execute", sqlite3.OperationalError),
        (RecordWriter, "_execute", MemoryError),
        (RecordWriter, "_pack", ValueError),
        (RecordWriter, "_event", TypeError),
        (RecordWriter, "_channel", KeyError),
        (record_module, "to_text", TypeError),
        (database, "create", sqlite3.DatabaseError),
    ],
)
def test_the_inside_of_the_record_writer_raises(
    tmp_path: Path, undisturbed: str, no_questions: None, monkeypatch: pytest.MonkeyPatch, owner: Any, name: str, error: type[Exception]
) -> None:
    planted = Planted(error)
    monkeypatch.setattr(owner, name, planted)
    result, doctor = watched(tmp_path / "run")
    monkeypatch.undo()
    assert planted.calls
    assert result == undisturbed
    reasons = [doctor.record.stopped, *doctor.record.memory.unobserved.values(), *doctor.chart().unobserved.values()]
    assert name == "to_text" or any("planted" in reason for reason in reasons)


@pytest.mark.parametrize("name", [*PROBES, "loop", "examiner"])
def test_a_part_that_cannot_attach(
    tmp_path: Path, undisturbed: str, no_questions: None, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    import importlib

    before = nn.functional.cross_entropy.__code__
    if name == "loop":
        monkeypatch.setattr(Outermost, "on", Planted(AttributeError))
    else:
        module = importlib.import_module("sickbay.examiner" if name == "examiner" else f"sickbay.probes.{name}")
        monkeypatch.setattr(module, "attach", Planted(AttributeError))
    result, _ = watched(tmp_path / "run")
    assert result == undisturbed
    assert any(problem["event"] == "attach" and "planted" in problem["error"] for problem in problems_in(tmp_path / "run"))
    assert nn.functional.cross_entropy.__code__ is before


# --- questions ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("module", "name"), EXAMS, ids=[module.__name__.rpartition(".")[2] for module, _ in EXAMS])
@pytest.mark.parametrize("error", [RuntimeError, MemoryError])
def test_a_question_that_raises(
    tmp_path: Path, undisturbed: str, no_questions: None, monkeypatch: pytest.MonkeyPatch, module: Any, name: str, error: type[Exception]
) -> None:
    planted = Planted(error)
    monkeypatch.setattr(module, name, planted)
    result, _ = watched(tmp_path / "run")
    assert planted.calls
    assert result == undisturbed
    assert [problem["probe"] for problem in problems_in(tmp_path / "run")] == ["examiner"]


@pytest.mark.parametrize(("name", "error"), [("fork", BlockingIOError(11, "no more processes")), ("pipe", OSError(24, "too many files"))])
def test_a_process_that_cannot_be_copied(
    tmp_path: Path, undisturbed: str, monkeypatch: pytest.MonkeyPatch, name: str, error: OSError
) -> None:
    def refuse() -> Any:
        raise error

    monkeypatch.setattr(fork.os, name, refuse)
    result, doctor = watched(tmp_path / "run")
    assert result == undisturbed
    assert any(str(error.strerror) in reason for reason in doctor.chart().unobserved.values())


def test_a_hanging_copy_is_asked_once(tmp_path: Path, undisturbed: str, monkeypatch: pytest.MonkeyPatch, no_questions: None) -> None:
    asked = []

    def hang(*_: Any) -> Any:
        asked.append(1)
        return ask(lambda: time.sleep(60), 0.3)

    monkeypatch.setattr(examiner.masks, "examine", hang)
    result, _ = watched(tmp_path / "run")
    assert result == undisturbed
    assert len(asked) == 1
    with pytest.raises(ChildProcessError):  # and it is gone
        os.waitpid(-1, os.WNOHANG)
