"""A watched training ends bit for bit like an unwatched one: weights, optimizer state, gradients, losses, random states, what it saved."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import noninterference_trainings as trainings
import pytest
import torch
import torch.nn.functional as F
from noninterference_models import STEPS, ByHand, batches, loss_of
from running import environment, report, sickbay
from torch import nn
from torch.nn.modules import module as module_internals
from torch.optim import optimizer as optimizer_internals

import sickbay as door

SCRIPT = Path(__file__).with_name("noninterference_trainings.py")
Hashes = dict[str, dict[str, Any]]


def _start(command: list[str], folder: Path, **variables: str) -> subprocess.Popen[bytes]:
    env = environment(PYTHONHASHSEED="0", **variables)
    return subprocess.Popen(command, cwd=folder, env=env, stdout=subprocess.PIPE, stderr=subprocess.PIPE)


def _hashes(process: subprocess.Popen[bytes]) -> Hashes:
    stdout, stderr = process.communicate(timeout=280)
    assert process.returncode == 0, stderr.decode()[-3000:]
    found: Hashes = json.loads(stdout)
    return found


@pytest.fixture(scope="module")
def three(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Hashes, Hashes, Hashes, Path]]:
    """All trainings under plain Python, each inside `watch`, and all together under `sickbay run`; two processes at a time."""
    folder = tmp_path_factory.mktemp("trainings")
    bare = _start([sys.executable, str(SCRIPT)], folder)
    watched = _start([sys.executable, str(SCRIPT), "--watch", "watches"], folder)
    first = _hashes(bare)
    run = _start(sickbay("run", "--out", "run", str(SCRIPT)), folder)
    yield first, _hashes(watched), _hashes(run), folder


@pytest.mark.parametrize("name", trainings.TRAININGS)
def test_no_difference(three: tuple[Hashes, Hashes, Hashes, Path], name: str) -> None:
    bare, watched, run, _ = three
    assert run[name] == bare[name]
    assert {part: watched[name][part] for part in bare[name]} == bare[name]


@pytest.fixture(scope="module")
def asleep(tmp_path_factory: pytest.TempPathFactory) -> Hashes:
    """All trainings inside a `watch` that sleeps through steps as early as it can."""
    return _hashes(_start([sys.executable, str(SCRIPT), "--watch", "watches", "--sleepy"], tmp_path_factory.mktemp("sleepy")))


@pytest.mark.parametrize("name", trainings.TRAININGS)
def test_no_difference_by_steps_slept_through(three: tuple[Hashes, Hashes, Hashes, Path], asleep: Hashes, name: str) -> None:
    bare, watched, _, _ = three
    assert {part: asleep[name][part] for part in bare[name]} == bare[name]
    assert (asleep[name]["problems"], asleep[name]["steps"]) == (watched[name]["problems"], watched[name]["steps"])


def test_steps_were_slept_through(asleep: Hashes) -> None:
    slept = {name for name, found in asleep.items() if found["slept"]}
    assert {"by-hand/fp32", "by-hand/bf16", "reference/dropout"} <= slept, sorted(slept)


@pytest.mark.parametrize("name", trainings.TRAININGS)
def test_it_was_watched(three: tuple[Hashes, Hashes, Hashes, Path], name: str) -> None:
    """A watch that sees nothing would disturb nothing."""
    _, watched, _, _ = three
    assert watched[name]["problems"] == []
    assert watched[name]["steps"] >= (4 if name == "compiled step" else STEPS)


def test_the_run_had_no_problem(three: tuple[Hashes, Hashes, Hashes, Path]) -> None:
    content = report(three[3])
    assert not content.get("problems")
    assert content["run"]["steps"] > 200


def test_two_processes_with_ddp(tmp_path: Path) -> None:
    found = []
    for kind in ("bare", "run"):
        ranks = []
        for rank in "01":
            command = sickbay("run", "--out", "run", str(SCRIPT)) if kind == "run" else [sys.executable, str(SCRIPT)]
            variables = {"RANK": rank, "WORLD_SIZE": "2", "LOCAL_RANK": rank, "INIT_FILE": str(tmp_path / f"meeting-{kind}")}
            ranks.append(_start([*command, "data parallel"], tmp_path, **variables))
        found.append([_hashes(process) for process in ranks])
    assert found[0] == found[1]
    assert found[0][0]["data parallel"]["gradients"] == found[0][1]["data parallel"]["gradients"]  # the two did work together
    content = report(tmp_path)
    assert content["run"]["steps"] == STEPS and content["run"]["world_size"] == 2
    assert not content.get("problems"), content["problems"]
    assert (tmp_path / "run" / "record-1.sqlite").exists()


def _globals_of_torch() -> dict[str, Any]:
    """Everything of torch's that a watch may touch, by identity."""
    hooks = {name: dict(value) for name, value in vars(module_internals).items() if name.startswith("_global_") and isinstance(value, dict)}
    hooks |= {
        name: dict(value) for name, value in vars(optimizer_internals).items() if name.startswith("_global_") and isinstance(value, dict)
    }
    owners = (torch, torch.autograd, torch.func, torch.nn.utils, torch.nn.utils.clip_grad, F, torch.Tensor, nn.Module)
    owners += (torch.optim.Optimizer, torch.amp.grad_scaler.GradScaler)
    members = {(owner.__name__, name): value for owner in owners for name, value in vars(owner).items() if callable(value)}
    codes = {key: value.__code__ for key, value in members.items() if hasattr(value, "__code__")}
    names = {key: sorted(vars(value)) for key, value in members.items() if hasattr(value, "__code__")}
    return {
        "hooks": hooks,
        "members": members,
        "codes": codes,
        "names": names,
        "modes": (torch._C._len_torch_function_stack(), torch._C._len_torch_dispatch_stack()),
        "next id": torch.utils.hooks.RemovableHandle.next_id,
        "finders": list(sys.meta_path),
        "excepthook": (sys.excepthook, sys.__excepthook__),
        "descriptors": sorted(os.listdir("/proc/self/fd")),
    }


def _train(steps: int) -> nn.Module:
    model = ByHand()
    optimizer = torch.optim.AdamW(model.parameters())
    for ids, targets in batches(steps):
        optimizer.zero_grad()
        loss_of(model, ids, targets).backward()
        optimizer.step()
    return model


def test_nothing_is_left_after_a_watch(tmp_path: Path) -> None:
    _train(1)
    with door.watch(out=tmp_path / "zero"):  # what is imported at the first watch stays
        _train(1)
    before = _globals_of_torch()
    with door.watch(out=tmp_path / "one"):
        model = _train(2)
        assert _globals_of_torch() != before
    assert _globals_of_torch() == before
    assert all(type(vars(part)[name]).__name__ != "StandIn" for part in model.modules() for name in vars(part))
    with pytest.raises(ZeroDivisionError), door.watch(out=tmp_path / "two"):
        model(*next(batches(1))[:1])
        raise ZeroDivisionError
    assert _globals_of_torch() == before


def test_watches_one_inside_another_and_one_after_another(tmp_path: Path) -> None:
    before = _globals_of_torch()
    with door.watch(out=tmp_path / "outer") as outer:
        _train(2)
        with door.watch(out=tmp_path / "inner") as inner:
            _train(3)
        _train(2)
    with door.watch(out=tmp_path / "next") as following:
        _train(4)
    assert _globals_of_torch() == before
    facts = [doctor.chart().facts for doctor in (outer, inner, following)]
    assert [fact["steps"] for fact in facts] == [7, 3, 4]
    assert [fact.get("problems", []) for fact in facts] == [[], [], []]
    seen = [len(doctor.chart()["loss"]) for doctor in (outer, inner, following)]
    assert seen == [7, 3, 4]
