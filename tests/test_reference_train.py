"""Training the reference from the command line: checkpoints, exact resume, and refusals."""

from __future__ import annotations

import json
import math
import subprocess
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from commands import call
from safetensors.torch import load_file

from sickbay.cli import generate as generate_command
from sickbay.cli import train as train_command
from sickbay.core.errors import UsageError
from sickbay.reference import data, train
from sickbay.reference.evaluation.evaluation import evaluate
from sickbay.reference.saving import checkpoint, durable

SMALL = ("--layers", "1", "--heads", "2", "--dim", "16", "--context", "16", "--batch", "4", "--warmup", "2", "--dropout", "0.1")


def checkpoint_bytes(folder: Path) -> dict[str, Any]:
    names = ("model", "optimizer", "random")
    return {f"{name}.{key}": value for name in names for key, value in load_file(folder / f"{name}.safetensors").items()}


@pytest.mark.parametrize("extra", [(), ("--accumulation", "3", "--untied", "--positions", "learned", "--norm", "layernorm")])
def test_a_resumed_run_ends_bit_for_bit_where_an_unbroken_one_does(tmp_path: Path, text: Path, extra: tuple[str, ...]) -> None:
    call(train_command, text, "--out", tmp_path / "whole", *SMALL, *extra, "--steps", "12", "--save-every", "5", "--eval-every", "4")

    # Stopped in the middle of the same schedule: the run dies in the step after its checkpoint.
    real_update, calls = train.update, 0

    def dies_at_step_8(*inputs: Any) -> None:
        nonlocal calls
        calls += 1
        if calls == 8:
            raise KeyboardInterrupt
        real_update(*inputs)

    with pytest.MonkeyPatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(train, "update", dies_at_step_8)
        call(train_command, text, "--out", tmp_path / "broken", *SMALL, *extra, "--steps", "12", "--save-every", "5", "--eval-every", "4")
    assert checkpoint.find(tmp_path / "broken").name == "step-000005"
    torch.manual_seed(99)
    call(train_command, text, "--out", tmp_path / "broken", "--resume")

    whole, resumed = (checkpoint_bytes(checkpoint.find(tmp_path / name)) for name in ("whole", "broken"))
    assert whole.keys() == resumed.keys()
    assert [key for key in whole if not torch.equal(whole[key], resumed[key])] == []


def test_a_resumed_run_differs_when_the_random_state_is_lost(tmp_path: Path, text: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    call(train_command, text, "--out", tmp_path / "whole", *SMALL, "--steps", "6", "--seed", "5")
    call(train_command, text, "--out", tmp_path / "broken", *SMALL, "--steps", "3", "--seed", "5")
    monkeypatch.setattr(torch, "set_rng_state", lambda state: None)
    call(train_command, text, "--out", tmp_path / "broken", "--resume", "--steps", "6")
    whole, resumed = (checkpoint_bytes(checkpoint.find(tmp_path / name)) for name in ("whole", "broken"))
    assert any(not torch.equal(whole[key], resumed[key]) for key in whole)


def test_a_watched_run_ends_bit_for_bit_where_an_unwatched_one_does(tmp_path: Path, text: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    call(train_command, text, "--out", "bare", *SMALL, "--steps", "6")
    call(train_command, text, "--out", "watched", *SMALL, "--steps", "6", "--watch")
    assert list(tmp_path.glob("sickbay-runs/*/report.json")), "nothing was watched"
    bare, watched = (checkpoint_bytes(tmp_path / name / "step-000006") for name in ("bare", "watched"))
    assert [key for key in bare if not torch.equal(bare[key], watched[key])] == []


def test_an_interrupted_save_leaves_the_older_checkpoint(tmp_path: Path, text: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    call(train_command, text, "--out", tmp_path / "run", *SMALL, "--steps", "2")
    before = checkpoint_bytes(tmp_path / "run" / "step-000002")

    def full_disk(file: Path) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(durable, "flush", full_disk)
    with pytest.raises(UsageError, match="No space left on device; --resume"):
        call(train_command, text, "--out", tmp_path / "run", "--resume", "--steps", "4")
    assert checkpoint.find(tmp_path / "run") == tmp_path / "run" / "step-000002"
    after = checkpoint_bytes(tmp_path / "run" / "step-000002")
    assert all(torch.equal(before[key], after[key]) for key in before)


def test_the_result_is_json_and_its_checkpoint_generates(tmp_path: Path, text: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert call(train_command, text, "--out", tmp_path / "run", *SMALL, "--steps", "30", "--lr", "0.01", "--json") == 0
    captured = capsys.readouterr()
    result = json.loads(captured.out)
    assert result["steps"] == 30
    assert result["val_loss"] < math.log(40)
    assert result["bits_per_byte"] == pytest.approx(result["val_loss"] / math.log(2))
    assert "step 30/30  loss" in captured.err and "tokens/s  ETA 0:00" in captured.err
    state = checkpoint.read(tmp_path / "run")
    corpus = data.prepare(text, tmp_path / "tokens", tokenizer=state.tokenizer)
    windows = data.spread_batches(corpus.val, 16, 7)
    assert evaluate(checkpoint.load_weights(state), windows).loss == pytest.approx(result["val_loss"], rel=1e-5)

    assert call(generate_command, result["checkpoint"], "--prompt", "First", "--tokens", "20", "--temperature", "0", "--json") == 0
    sample = json.loads(capsys.readouterr().out)
    assert sample["prompt"] == "First"
    assert len(sample["text"]) == 20
    assert call(generate_command, tmp_path / "run", "--prompt", "First", "--tokens", "20", "--temperature", "0") == 0
    assert capsys.readouterr().out == "First" + sample["text"] + "\n"


def refusal(command: ModuleType, *words: str | Path) -> str:
    with pytest.raises(UsageError) as refused:
        call(command, *words)
    assert "\n" not in str(refused.value)
    return str(refused.value)


def test_bad_input_to_train_is_refused_in_one_line_with_the_way_out_and_nothing_is_written(tmp_path: Path, text: Path) -> None:
    out, latin, short, empty = tmp_path / "out", tmp_path / "latin.txt", tmp_path / "short.txt", tmp_path / "empty.txt"
    latin.write_bytes(b"caf\xe9 " * 1000)
    short.write_text("too short")
    empty.write_text("")
    assert "no text file at" in refusal(train_command, tmp_path / "absent.txt", "--out", out)
    assert "latin.txt is not UTF-8 text (byte 3)" in refusal(train_command, tmp_path, "--out", out)
    assert "not UTF-8" in refusal(train_command, latin, "--out", out)
    assert "9 bytes; context=64 needs at least 641" in refusal(train_command, short, "--out", out)
    assert "0 bytes" in refusal(train_command, empty, "--out", out)
    assert "divisor of dim=128" in refusal(train_command, text, "--out", out, "--heads", "3")
    assert "steps is 0" in refusal(train_command, text, "--out", out, "--steps", "0")
    assert "--resume needs --out" in refusal(train_command, text, "--resume")
    assert "nothing to resume" in refusal(train_command, text, "--out", out, "--resume")
    assert "device 'gpu7'" in refusal(train_command, text, "--out", out, "--device", "gpu7")
    assert not out.exists()
    out.write_text("a file")
    assert "writable --out" in refusal(train_command, text, "--out", out)


def test_an_earlier_run_is_neither_overwritten_nor_silently_changed(tmp_path: Path, text: Path) -> None:
    run = tmp_path / "run"
    call(train_command, text, "--out", run, *SMALL, "--steps", "2")
    assert "--resume goes on with it" in refusal(train_command, text, "--out", run, *SMALL)
    assert "has all of its 2 steps" in refusal(train_command, text, "--out", run, "--resume")
    assert "learning_rate was 0.001" in refusal(train_command, text, "--out", run, "--resume", "--lr", "0.1", "--steps", "4")
    assert "dim was 16" in refusal(train_command, text, "--out", run, "--resume", "--dim", "32", "--steps", "4")
    text.write_text(text.read_text(encoding="utf-8") + "more", encoding="utf-8")
    assert "not the text" in refusal(train_command, text, "--out", run, "--resume", "--steps", "4")


def test_bad_input_to_generate_is_refused_in_one_line_with_the_way_out(tmp_path: Path, text: Path) -> None:
    run = tmp_path / "run"
    call(train_command, text, "--out", run, *SMALL, "--steps", "1")
    assert "`sickbay train TEXT`" in refusal(generate_command, tmp_path / "absent")
    assert "holds none" in refusal(generate_command, tmp_path)
    assert "--tokens is 0" in refusal(generate_command, run, "--tokens", "0")
    assert "top_p is 2.0" in refusal(generate_command, run, "--top-p", "2")
    assert "'日' (character 0)" in refusal(generate_command, run, "--prompt", "日")
    weights = checkpoint.find(run) / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:100])
    assert "model.safetensors has changed" in refusal(generate_command, run)
    (checkpoint.find(run) / "state.json").write_text("{")
    assert "not a readable checkpoint" in refusal(generate_command, run)


def test_a_loss_that_is_no_longer_finite_ends_the_run_with_one_line(
    tmp_path: Path, text: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    real = train.prediction_loss
    monkeypatch.setattr(train, "prediction_loss", lambda *inputs: real(*inputs) * math.nan)
    assert call(train_command, text, "--out", tmp_path / "run", *SMALL, "--steps", "3") == 1
    assert "the loss is nan at step 3" in capsys.readouterr().err
    assert not list((tmp_path / "run").glob("step-*"))


@pytest.mark.parametrize("module", ["sickbay.cli.train", "sickbay.cli.generate"])
def test_the_commands_describe_themselves_without_torch(module: str) -> None:
    script = (
        "import sys, argparse, importlib; sys.modules['torch'] = None;"
        f"command = importlib.import_module('{module}'); command.add_arguments(argparse.ArgumentParser(description=command.__doc__))"
    )
    subprocess.run([sys.executable, "-c", script], check=True)
