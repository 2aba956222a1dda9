"""What one forward pass shows of a model's units, against layers whose units are dead or alive by their bias."""

from __future__ import annotations

import pytest
import torch
from exam_models import patient_of
from torch import nn

from sickbay.exams import internals
from sickbay.exams.fork import NoAnswer


@pytest.mark.parametrize(("bias", "share"), [(-9.0, 1.0), (9.0, 0.0)])
def test_units_are_judged_where_each_row_is_one_input(bias: float, share: float) -> None:
    torch.manual_seed(0)
    layer = nn.Linear(6, 24)
    nn.init.constant_(layer.bias, bias)
    patient, _ = patient_of(nn.Sequential(layer, nn.ReLU(), nn.Linear(24, 1)), torch.randn(48, 6).clamp(-2, 2))
    found = internals.examine(patient, 0)
    assert not isinstance(found, NoAnswer)
    (reading,) = [reading for reading in found if reading["signal"] == "dead_units"]
    assert reading["value"] == reading["note"]["all_dead_so_far"] == share
    assert reading["note"]["units"] == 24
