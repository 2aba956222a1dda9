"""Models that come after others in one run, as in cross-validation, and the optimizers they are trained with."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

import sickbay
from sickbay.core.condition import checkup
from sickbay.registry import conditions


def model() -> nn.Module:
    return nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 3))


def step(net: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    optimizer.zero_grad()
    nn.functional.cross_entropy(net(torch.randn(8, 4)), torch.randint(0, 3, (8,))).backward()
    optimizer.step()


@pytest.mark.parametrize("own", [True, False])
def test_a_second_fold_needs_an_optimizer_of_its_own(tmp_path: Path, own: bool) -> None:
    with sickbay.watch(out=tmp_path / "run") as doctor:
        net = model()
        optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
        for fold in range(2):
            if fold:
                net = model()
                optimizer = torch.optim.SGD(net.parameters(), lr=0.1) if own else optimizer
            for _ in range(8):
                step(net, optimizer)
    found = checkup(doctor.chart(), [conditions()["optimizer-missing-parameters"]]).diagnoses
    assert [(one.severity, one.step) for one in found] == ([] if own else [("critical", 8)])


class Frozen(nn.Module):
    """A feature `(8, 4)` nobody trains, called for the first time after some steps."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Linear(4, 4).requires_grad_(False)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.inner(x)
        return out


def test_a_model_that_comes_later_and_is_not_trained_is_fine(tmp_path: Path) -> None:
    with sickbay.watch(out=tmp_path / "run") as doctor:
        net, late = model(), Frozen()
        optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
        for index in range(8):
            step(net if index < 4 else nn.Sequential(late, net), optimizer)
    assert not checkup(doctor.chart(), [conditions()["optimizer-missing-parameters"]]).diagnoses


def test_adapters_added_behind_the_optimizer_s_back(tmp_path: Path) -> None:
    with sickbay.watch(out=tmp_path / "run") as doctor:
        net = model().requires_grad_(False)
        optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
        net.append(nn.Linear(3, 3))
        for _ in range(6):
            step(net, optimizer)
    found = checkup(doctor.chart(), [conditions()["optimizer-missing-parameters"]]).diagnoses
    assert [one.severity for one in found] == ["critical"]
    assert "3.weight" in found[0].summary
