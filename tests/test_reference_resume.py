"""A run goes on as if it had never stopped: after kills, damage, full disks and signals."""

from __future__ import annotations

import json
import os
import random
import resource
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import commands
import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file

from sickbay.cli import train as train_command
from sickbay.core.errors import UsageError
from sickbay.reference import train
from sickbay.reference.saving import checkpoint, durable, random_states
from sickbay.reference.training import interrupt

SMALL = ("--layers", "1", "--heads", "2", "--dim", "16", "--context", "16", "--batch", "4", "--warmup", "2", "--dropout", "0.1")


def call(*words: str | Path) -> int:
    return commands.call(train_command, *words)


def values(folder: Path) -> dict[str, torch.Tensor]:
    return {f"{file.name}.{key}": value for file in folder.glob("*.safetensors") for key, value in load_file(file).items()}


def differing(one: Path, other: Path) -> list[str]:
    left, right = values(one), values(other)
    assert left and left.keys() == right.keys()
    return [key for key in left if not torch.equal(left[key], right[key])]


def test_a_training_killed_twenty_times_ends_bit_for_bit_like_one_left_alone(tmp_path: Path) -> None:
    script = Path(__file__).with_name("killed_training.py")
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run([sys.executable, script, tmp_path, "20", "0"], capture_output=True, text=True, env=environment, timeout=280)
    assert done.returncode == 0, done.stderr
    told = json.loads(done.stdout)
    assert told["kills"] == 20
    assert 5 <= told["kills_in_a_save"] <= 19, "both kinds of places must be tried"
    assert told["ended"] and told["same_names"]
    assert told["steps"] == ["step-000060", "step-000060"]
    assert told["values"] > 20 and told["values_that_differ"] == []
    assert told["losses"] == 120 and told["losses_that_differ"] == 0


def truncated(folder: Path) -> str:
    file = folder / "optimizer.safetensors"
    file.write_bytes(file.read_bytes()[:-1])
    return "optimizer.safetensors has changed"


def flipped(folder: Path) -> str:
    file = folder / "model.safetensors"
    held = bytearray(file.read_bytes())
    held[len(held) // 2] ^= 1
    file.write_bytes(bytes(held))
    return "model.safetensors has changed"


def without_a_file(folder: Path) -> str:
    (folder / "random.safetensors").unlink()
    return "random.safetensors is missing"


def without_state(folder: Path) -> str:
    (folder / "state.json").unlink()
    return "state.json is missing"


def edited_state(folder: Path) -> str:
    state = json.loads((folder / "state.json").read_text())
    state["recipe"]["seed"] += 1
    (folder / "state.json").write_text(json.dumps(state))
    return "state.json has changed"


def emptied_state(folder: Path) -> str:
    (folder / "state.json").write_text("")
    return "state.json cannot be read"


@pytest.mark.parametrize("damage", [truncated, flipped, without_a_file, without_state, edited_state, emptied_state])
def test_a_damaged_newest_checkpoint_gives_way_to_the_one_before(
    tmp_path: Path, text: Path, damage: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    call(text, "--out", tmp_path / "run", *SMALL, "--steps", "6", "--save-every", "2")
    run = tmp_path / "run"
    assert sorted(path.name for path in run.glob("step-*")) == ["step-000004", "step-000006"], "the newest two stay"
    shutil.copytree(run / "step-000006", tmp_path / "whole")
    problem = damage(run / "step-000006")
    capsys.readouterr()

    assert call("--out", run, "--resume") == 0
    told = capsys.readouterr().err
    assert f"step-000006 is not a readable checkpoint: {problem}" in told
    assert "taking step-000004, the one before" in told
    assert differing(tmp_path / "whole", run / "step-000006") == []
    assert sorted(path.name for path in run.iterdir() if path.is_dir()) == ["step-000004", "step-000006"]


def test_where_every_checkpoint_is_damaged_each_is_named(tmp_path: Path, text: Path) -> None:
    call(text, "--out", tmp_path / "run", *SMALL, "--steps", "4", "--save-every", "2")
    for folder in (tmp_path / "run").glob("step-*"):
        flipped(folder)
    with pytest.raises(UsageError, match=r"cannot resume: .*step-000004 .*model\.safetensors has changed.*; .*step-000002"):
        call("--out", tmp_path / "run", "--resume", "--steps", "8")


def test_a_damaged_later_checkpoint_does_not_crowd_out_those_of_the_resumed_run(tmp_path: Path, text: Path) -> None:
    run = tmp_path / "run"
    call(text, "--out", run, *SMALL, "--steps", "8", "--save-every", "4")
    flipped(run / "step-000008")
    call("--out", run, "--resume", "--save-every", "1", "--steps", "6")
    assert sorted(path.name for path in run.glob("step-*")) == ["step-000005", "step-000006"]
    assert checkpoint.read(run).step == 6


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(place=st.floats(0, 1, exclude_max=True), bit=st.integers(0, 7), number=st.integers(0, 2))
def test_no_bit_of_a_sealed_folder_changes_unseen(tmp_path: Path, place: float, bit: int, number: int) -> None:
    target = tmp_path / "sealed"
    if not target.exists():
        partial = durable.begin(target)
        (partial / "values").write_bytes(bytes(range(256)) * 3)
        (partial / "empty").write_bytes(b"")
        (partial / "words").write_text("to be or not to be")
        durable.publish(partial, target, {"step": 12, "groups": [{"lr": 0.1}]})
    before = {file: file.read_bytes() for file in target.iterdir()}
    file = [target / "values", target / "words", target / "state.json"][number]
    held = bytearray(before[file])
    held[int(place * len(held))] ^= 1 << bit
    file.write_bytes(bytes(held))
    try:
        with pytest.raises(ValueError, match=r"(values|words|state\.json) (has changed|cannot be read)"):
            durable.read(target)
    finally:
        file.write_bytes(before[file])
    assert durable.read(target) == {"step": 12, "groups": [{"lr": 0.1}]}


def test_a_new_attempt_clears_what_its_own_last_one_left_and_nothing_else(tmp_path: Path) -> None:
    another = durable.begin(tmp_path / "another")
    (another / "values").write_bytes(b"under way")
    left = durable.begin(tmp_path / "mine")
    (left / "half").write_bytes(b"left by a kill")
    assert durable.begin(tmp_path / "mine") == left
    assert list(left.iterdir()) == []
    assert (another / "values").read_bytes() == b"under way"


def test_what_a_kill_left_of_another_step_goes_with_the_next_checkpoint(tmp_path: Path, text: Path) -> None:
    run = tmp_path / "run"
    call(text, "--out", run, *SMALL, "--steps", "2")
    (durable.begin(run / "step-000003") / "half").write_bytes(b"left by a kill")
    call("--out", run, "--resume", "--steps", "4")
    assert sorted(path.name for path in run.iterdir() if path.is_dir()) == ["step-000002", "step-000004"]


def test_a_full_disk_ends_no_training_and_costs_no_checkpoint(
    tmp_path: Path, text: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    call(text, "--out", tmp_path / "whole", *SMALL, "--steps", "9", "--save-every", "3")
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    real_save, run = checkpoint.save, tmp_path / "run"

    def save(*inputs: Any, **named: Any) -> Path:
        if named["step"] > 3:  # from then on the kernel refuses what is longer than this, as a full disk does
            resource.setrlimit(resource.RLIMIT_FSIZE, (4096, hard))
        try:
            return real_save(*inputs, **named)
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))

    with monkeypatch.context() as patch:
        patch.setattr(checkpoint, "save", save)
        with pytest.raises(UsageError, match="File too large; --resume goes on from its newest checkpoint"):
            call(text, "--out", run, *SMALL, "--steps", "9", "--save-every", "3")
    told = capsys.readouterr().err
    for step in (6, 9):
        assert f"step {step}/9  no checkpoint could be written to {run} (File too large); training goes on" in told
    assert f"the newest is {run / 'step-000003'}" in told
    assert "step 9/9  validation loss" in told, "the training reached its end"
    assert [path.name for path in run.iterdir() if path.is_dir()] == ["step-000003"], "nothing half-written stays"
    assert call("--out", run, "--resume") == 0
    assert differing(tmp_path / "whole" / "step-000009", run / "step-000009") == []


def test_a_folder_that_cannot_be_written_is_an_os_error_and_leaves_what_was_there(
    tmp_path: Path, text: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    real, run = Path.mkdir, tmp_path / "run"
    call(text, "--out", run, *SMALL, "--steps", "3")

    def read_only(path: Path, *inputs: Any, **named: Any) -> None:
        if path.name.startswith(durable.PARTIAL) and path.parent == run:
            raise OSError(30, os.strerror(30), str(path))
        real(path, *inputs, **named)

    monkeypatch.setattr(Path, "mkdir", read_only)
    with pytest.raises(UsageError, match="Read-only file system; --resume"):
        call("--out", run, "--resume", "--steps", "5", "--save-every", "1")
    assert "step 4/5  no checkpoint could be written" in capsys.readouterr().err
    assert checkpoint.read(run).step == 3


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_ends_a_run_with_a_checkpoint_from_which_it_goes_on_bit_for_bit(
    tmp_path: Path, text: Path, number: signal.Signals, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    call(text, "--out", tmp_path / "whole", *SMALL, "--steps", "8", "--ema", "0.9")
    handlers = [signal.getsignal(known) for known in interrupt.SIGNALS]
    real_update, calls = train.update, 0

    def signalled_at_step_5(*inputs: Any) -> None:
        nonlocal calls
        calls += 1
        if calls == 5:
            os.kill(os.getpid(), number)
        real_update(*inputs)

    run = tmp_path / "run"
    with monkeypatch.context() as patch:
        patch.setattr(train, "update", signalled_at_step_5)
        assert call(text, "--out", run, *SMALL, "--steps", "8", "--ema", "0.9") == 128 + number
    told = capsys.readouterr().err
    assert f"{number.name}: ending after this step, with a checkpoint; once more ends at once" in told
    way_on = (
        f"stopped by {number.name} after step 5; its checkpoint is {run / 'step-000005'}; go on with it: sickbay train --out {run} --resume"
    )
    assert way_on in told
    assert [signal.getsignal(known) for known in interrupt.SIGNALS] == handlers
    assert call("--out", run, "--resume") == 0
    assert differing(tmp_path / "whole" / "step-000008", run / "step-000008") == []


def test_a_second_signal_is_obeyed_at_once_but_not_the_echo_of_the_first(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(interrupt, "GRACE", 3600.0)
    with pytest.raises(KeyboardInterrupt), interrupt.on_request(speaks=False) as request:
        os.kill(os.getpid(), signal.SIGINT)
        os.kill(os.getpid(), signal.SIGINT)
        assert request.signal == signal.SIGINT
        monkeypatch.setattr(interrupt, "GRACE", 0.0)
        os.kill(os.getpid(), signal.SIGINT)


def drawn() -> list[float]:
    return [random.random(), random.gauss(0, 1), np.random.rand(), np.random.randn(), torch.rand(()).item()]


def test_random_states_go_on_where_they_were(tmp_path: Path) -> None:
    random_states.seed(7)
    drawn()  # leaves half of a pair of normal numbers behind in Python and NumPy
    states = random_states.capture()
    expected = drawn()
    assert drawn() != expected
    random_states.restore(states)
    assert drawn() == expected
    random_states.draw_anew(3, 1)
    first = drawn()
    random_states.draw_anew(3, 1)
    assert drawn() == first
    random_states.draw_anew(3, 2)
    assert drawn() != first


def test_the_gradient_scaler_goes_on_where_it_was(tmp_path: Path, text: Path) -> None:
    options = (*SMALL, "--precision", "fp16", "--save-every", "3", "--optimizer", "muon")
    call(text, "--out", tmp_path / "whole", *options, "--steps", "6")
    shutil.copytree(tmp_path / "whole" / "step-000003", tmp_path / "run" / "step-000003")
    shutil.copy(tmp_path / "whole" / "config.toml", tmp_path / "run")
    call("--out", tmp_path / "run", "--resume")
    whole, resumed = (checkpoint.read(tmp_path / name) for name in ("whole", "run"))
    assert whole.scaler == resumed.scaler and whole.scaler is not None and whole.scaler["_growth_tracker"] == 6
    assert differing(whole.folder, resumed.folder) == []
