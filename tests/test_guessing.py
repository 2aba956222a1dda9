"""The loss of guessing by frequency, against entropies that are known by hand."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from charts import chart
from torch import Tensor
from verdicts import ask

from sickbay.core.diagnosis import Diagnosis
from sickbay.core.reading import Reading
from sickbay.core.record import RecordWriter
from sickbay.patient import LossCall, Patient
from sickbay.probes.guessing import Guessing
from sickbay.probes.loop import Loop


def told(folder: Path, calls: list[tuple[str, Tensor, Tensor, str]]) -> list[float]:
    """What the probe wrote for one loss call a step: function, outputs, targets, line."""
    record, patient = RecordWriter(str(folder), 0, 1 << 20), Patient()
    probe = Guessing(patient, record, Loop(patient, record))
    written: list[float] = []
    record.read = lambda signal, value, **_: written.append(value)  # type: ignore[method-assign, assignment]
    for step, (name, outputs, targets, line) in enumerate(calls):
        record.step = step
        probe.loss(LossCall(name, outputs, targets, -100, "mean", getattr(F, name)(outputs, targets), line, True))
    return written


def test_classes_by_their_frequency_without_what_is_ignored(tmp_path: Path) -> None:
    targets = torch.tensor([0] * 60 + [1] * 20 + [-100] * 20)
    (value,) = told(tmp_path / "run", [("cross_entropy", torch.zeros(100, 2), targets, "a:1")])
    assert value == pytest.approx(-(0.75 * math.log(0.75) + 0.25 * math.log(0.25)))


def test_too_few_targets_for_their_classes_tell_nothing(tmp_path: Path) -> None:
    assert not told(tmp_path / "run", [("cross_entropy", torch.zeros(10, 50), torch.arange(10), "a:1")])


def test_answers_by_column_and_summed_over_steps(tmp_path: Path) -> None:
    first, second = torch.tensor([[1.0, 0.0]] * 20), torch.tensor([[0.0, 0.0]] * 20)
    name = "binary_cross_entropy_with_logits"
    values = told(tmp_path / "run", [(name, torch.zeros(20, 2), answers, "a:1") for answers in (first, second)])
    assert values == pytest.approx([0.0, math.log(2) / 2])


def test_soft_answers_and_a_second_loss_tell_nothing(tmp_path: Path) -> None:
    name, half = "binary_cross_entropy_with_logits", torch.full((40, 1), 0.5)
    assert not told(tmp_path / "soft", [(name, torch.zeros(40, 1), half, "a:1")])
    one = (name, torch.zeros(40, 1), torch.ones(40, 1), "a:1")
    assert len(told(tmp_path / "two", [one, (*one[:3], "a:2"), one])) == 1


def test_a_plateau_at_the_frequency_of_the_answers() -> None:
    stuck = [0.5 + 0.002 * ((7 * step) % 11 - 5) for step in range(160)]
    answers = [Reading(step, "frequency_loss", 0.5) for step in range(20)]
    verdict = ask("loss-plateau", chart(loss=stuck, frequency_loss=answers))
    assert isinstance(verdict, Diagnosis)
    assert "guessing by frequency" in verdict.summary
    assert ask("loss-plateau", chart(loss=[value - 0.1 for value in stuck], frequency_loss=answers)) is None
