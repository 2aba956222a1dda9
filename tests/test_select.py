"""What no chosen condition reads is not measured."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

import sickbay
from sickbay.core.signals import SIGNALS
from sickbay.reference.case import Case, run


def _watched(folder: Path, **choice: Any) -> set[str]:
    with sickbay.watch(out=folder, **choice) as doctor:
        run(Case(steps=8))
    chart = doctor.chart()
    return {signal for signal in SIGNALS if len(chart[signal])}


def test_only_what_is_asked_for_is_measured(tmp_path: Path) -> None:
    everything, chosen = _watched(tmp_path / "all"), _watched(tmp_path / "some", select=["causal-leak"])
    asked = {"future_influence", "target_offset"}
    assert asked <= chosen
    left_out = {"activation_rms", "update_ratio", "batch_repeat", "initial_loss", "ngram_loss"}
    assert left_out <= everything
    assert not left_out & chosen


@pytest.mark.parametrize("choice", [{"select": ["nan"]}, {"ignore": ["speed", "memory", "generation"]}])
def test_chapters_may_be_chosen(tmp_path: Path, choice: dict[str, list[str]]) -> None:
    signals = _watched(tmp_path / "run", **choice)
    assert {"loss", "grad_norm", "activation_rms", "update_ratio"} <= signals
    assert not {"throughput_gain", "resident_memory"} & signals
