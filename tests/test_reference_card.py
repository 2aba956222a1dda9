"""`sickbay train` ends with the card of what it trained."""

from __future__ import annotations

import json
from pathlib import Path

import commands
import pytest

from sickbay.cli import train as command

SHAPE = ("--layers", "1", "--heads", "2", "--dim", "16", "--context", "16", "--batch", "4", "--warmup", "2")


def run(*words: str | Path) -> int:
    return commands.call(command, *words)


def test_the_run_ends_with_its_card_and_the_commands_to_go_on(tmp_path: Path, text: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "my run"
    assert run(text, "--out", out, *SHAPE, "--steps", "10", "--eval-every", "2") == 0
    said = capsys.readouterr().out
    lines = said.splitlines()
    assert len(lines) <= 30
    assert lines[0] == "sickbay train  text.txt"
    assert "10 steps of 64 tokens" in lines[1]
    assert "over 399, perplexity" in said  # each token of the validation part but the first
    assert "train longer?  not at this learning rate: the validation loss still falls" in said
    assert f"sickbay generate '{out}/step-000010'   # write more" in lines
    assert f"sickbay train --out '{out}' --resume --steps 20   # train on, the learning rate at 6.3e-04 again" in lines

    assert run("--out", out, "--resume", "--steps", "12") == 0
    # At the last step the whole validation part is evaluated instead.
    assert "not known: 0 evaluations under way" in capsys.readouterr().out


def test_a_run_whose_learning_rate_stays_up_may_go_on_as_it_is(tmp_path: Path, text: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "run"
    assert run(text, "--out", out, *SHAPE, "--steps", "10", "--eval-every", "2", "--schedule", "constant") == 0
    said = capsys.readouterr().out
    assert "train longer?  yes: the validation loss still falls" in said
    assert said.endswith("--resume --steps 20   # train on\n")


def test_as_json_the_history_and_the_noise_are_there(tmp_path: Path, text: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(text, "--out", tmp_path / "run", *SHAPE, "--steps", "6", "--eval-every", "2", "--json") == 0
    found = json.loads(capsys.readouterr().out)
    assert [step for step, _ in found["history"]] == [2, 4]
    assert found["val_tokens"] == 399
    assert 0 < found["val_error"] < found["val_loss"]
