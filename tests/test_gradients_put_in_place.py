"""Gradients that torch.autograd.grad returns and the script puts in place itself are neither left over nor dropped."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

import sickbay

Put = Callable[[nn.Parameter, Tensor], None]


def _assigned(parameter: nn.Parameter, gradient: Tensor) -> None:
    parameter.grad = gradient


def _signs(parameter: nn.Parameter, gradient: Tensor) -> None:
    parameter.grad = gradient.sign()


def _loss(model: nn.Module) -> Tensor:
    return nn.functional.cross_entropy(model(torch.randn(8, 4)), torch.randint(0, 3, (8,)))


@pytest.mark.parametrize("put", [_assigned, _signs])
def test_new_gradients_take_the_old_ones_place(tmp_path: Path, put: Put) -> None:
    torch.manual_seed(0)
    with sickbay.watch(out=tmp_path / "run") as doctor:
        model = nn.Linear(4, 3)
        optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
        for _ in range(12):
            for parameter, gradient in zip(model.parameters(), torch.autograd.grad(_loss(model), list(model.parameters()))):
                put(parameter, gradient)
            optimizer.step()
    chart = doctor.chart()
    assert not len(chart["carried_gradient"]) and not len(chart["dropped_backwards"])
    assert set(chart["backwards_since_step"].values) == {1.0}


@pytest.mark.parametrize(("zeroes", "carried"), [(True, 0.0), (False, 1.0)])
def test_backward_after_a_penalty_is_still_looked_at(tmp_path: Path, zeroes: bool, carried: float) -> None:
    torch.manual_seed(0)
    with sickbay.watch(out=tmp_path / "run") as doctor:
        model = nn.Linear(4, 3)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
        for _ in range(12):
            inputs = torch.randn(8, 4, requires_grad=True)
            loss = nn.functional.cross_entropy(model(inputs), torch.randint(0, 3, (8,)))
            (slope,) = torch.autograd.grad(loss, inputs, create_graph=True)
            if zeroes:
                optimizer.zero_grad()
            (loss + slope.pow(2).sum()).backward()
            optimizer.step()
    chart = doctor.chart()
    assert chart["carried_gradient"].values and all(value == pytest.approx(carried) for value in chart["carried_gradient"].values)
    assert not len(chart["dropped_backwards"])


def test_calls_one_by_one_are_timed_where_no_backward_is_called(tmp_path: Path) -> None:
    torch.manual_seed(0)
    with sickbay.watch(out=tmp_path / "run") as doctor:
        model = nn.Sequential(nn.Linear(4, 8), nn.GELU(), nn.Linear(8, 3))
        optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
        for _ in range(9):
            inputs, targets = torch.randn(12, 4), torch.randint(0, 3, (12,))
            loss = nn.functional.cross_entropy(torch.cat([model(row[None]) for row in inputs]), targets)
            for parameter, gradient in zip(model.parameters(), torch.autograd.grad(loss, list(model.parameters()))):
                parameter.grad = gradient
            optimizer.step()
    assert [reading.value for reading in doctor.chart()["single_forwards"]] == [12.0]
