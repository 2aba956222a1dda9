"""What one forward pass shows of a model's units, against layers whose units are dead or alive by their bias."""

from __future__ import annotations

import pytest
import torch
from exam_models import patient_of
from torch import Tensor, nn

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


class TwoCalls(nn.Module):
    """Two layers whose ReLU is a function called by one module; the second layer's units are dead."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(6, 8), nn.Linear(8, 8)
        nn.init.constant_(self.first.bias, 9.0)
        nn.init.zeros_(self.second.weight)
        nn.init.constant_(self.second.bias, -1.0)

    def forward(self, x: Tensor) -> Tensor:
        return torch.relu(self.second(torch.relu(self.first(x))))


def test_two_relus_of_one_module_are_two_layers() -> None:
    patient, _ = patient_of(TwoCalls(), torch.randn(48, 6).clamp(-2, 2))
    found = internals.examine(patient, 0)
    assert not isinstance(found, NoAnswer)
    assert {reading["where"]: reading["value"] for reading in found if reading["signal"] == "dead_units"} == {"": 0.0, "#2": 1.0}
