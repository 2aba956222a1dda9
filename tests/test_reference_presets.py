"""Nothing is found on the presets that a processor trains in seconds; of the larger ones see bench/presets.py."""

from __future__ import annotations

import json
import subprocess
from pathlib import Path
from typing import Any

import pytest
import torch
from running import environment, sickbay

from sickbay.reference import presets
from sickbay.reference.data.sources import shipped_text
from sickbay.reference.settings.presets import PRESETS
from sickbay.reference.training.muon import Muon

STEPS = 30


def told(*words: str, folder: Path) -> dict[str, Any]:
    """The JSON that the command printed last."""
    done = subprocess.run(sickbay(*words), cwd=folder, env=environment(), capture_output=True, text=True, timeout=280)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]
    found: dict[str, Any] = json.loads(done.stdout[done.stdout.index("{\n") :])
    return found


@pytest.mark.slow
@pytest.mark.parametrize("name", ["tiny", "best", "encoder", "seq2seq"])
def test_nothing_is_found_on_a_training_of_the_preset(name: str, tmp_path: Path) -> None:
    options = ("--preset", name, "--steps", str(STEPS), "--eval-every", "0", "--out", "trained")
    found = told("run", "--json", "--out", "run", "-m", "sickbay", "train", str(shipped_text()), *options, folder=tmp_path)
    assert [each for each in found["diagnoses"] if each["severity"] != "note"] == []
    assert found["run"]["ended"] == "finished" and len(found["healthy"]) > 25, found["unexamined"]


@pytest.mark.slow
@pytest.mark.parametrize("name", ["tiny", "best", "encoder", "seq2seq"])
def test_nothing_is_found_in_a_checkup_of_the_preset(name: str, tmp_path: Path) -> None:
    found = told(
        "checkup", "--json", "--skip", "throughput,learning-rate,settings,memory", f"sickbay.reference.presets:{name}", folder=tmp_path
    )
    assert found["findings"] == []
    verdicts = {row["exam"]: row["verdict"] for row in found["exams"]}
    assert {verdicts[exam] for exam in ("shapes", "gradients", "initial-loss", "labels", "training")} == {"ok"}
    (overfit,) = (row for row in found["exams"] if row["exam"] == "overfit")
    # Its time is limited: on a busy machine the loss is still on its way down when it is over.
    assert overfit["verdict"] == "ok" or overfit["text"].startswith("not done in the time given, and still falling")
    assert verdicts["causality"] == ("not examined" if name == "encoder" else "ok"), "an encoder is asked for no next token"


def test_every_preset_is_a_target() -> None:
    assert all(callable(getattr(presets, name)) for name in PRESETS)


def test_a_target_is_what_the_command_would_train() -> None:
    target, again = presets.best(), presets.best()
    assert isinstance(target.optimizer, Muon)
    assert target.model.config.vocab_size == 65 and target.model.config.activation == "relu2"
    assert all(torch.equal(left, right) for left, right in zip(target.model.parameters(), again.model.parameters(), strict=True))
    ids, targets = target.batches[0]
    assert ids.shape == (16, 64) and torch.equal(ids[:, 1:], targets[:, :-1])
    assert len(target.batches) == presets.BATCHES
    assert target.loss(target.model, target.batches[0]).item() == pytest.approx(4.174, abs=0.01)  # ln 65
