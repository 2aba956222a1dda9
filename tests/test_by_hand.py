"""Updates that a script makes by its own hand are measured like an optimizer's."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

import sickbay

STEPS = 12
RATE = 0.5


def _in_place(weights: dict[str, Tensor], gradients: list[Tensor]) -> dict[str, Tensor]:
    with torch.no_grad():
        for weight, gradient in zip(weights.values(), gradients):
            weight -= RATE * gradient
    return weights


def _in_their_stead(weights: dict[str, Tensor], gradients: list[Tensor]) -> dict[str, Tensor]:
    return {name: (w - RATE * g).detach().requires_grad_() for (name, w), g in zip(weights.items(), gradients)}


def _train(update: object, steps: int = STEPS, width: int = 4, classes: int = 3) -> list[float]:
    """Trains a linear model by hand; the true ratio of each update to the first weight."""
    torch.manual_seed(0)
    inputs, targets = torch.randn(32, width), torch.randint(0, classes, (32,))
    weights = {"w": torch.randn(width, classes).requires_grad_(), "b": torch.ones(classes).requires_grad_()}
    ratios = []
    for _ in range(steps):
        loss = nn.functional.cross_entropy(inputs @ weights["w"] + weights["b"], targets)
        for weight in weights.values():
            weight.grad = None
        loss.backward()
        gradients = [weight.grad for weight in weights.values() if weight.grad is not None]
        ratios.append(float(RATE * gradients[0].norm() / weights["w"].detach().norm()))
        weights = update(weights, gradients)  # type: ignore[operator]
    return ratios


@pytest.mark.parametrize("update", [_in_place, _in_their_stead])
def test_the_update_is_the_measured_change(tmp_path: Path, update: object) -> None:
    with sickbay.watch(out=tmp_path / "run") as doctor:
        ratios = _train(update)
    chart = doctor.chart()
    measured = [reading for reading in chart["update_ratio"] if "[4, 3]" in reading.where]
    assert measured and measured[0].step == 0
    assert measured[0].value == pytest.approx(ratios[0], rel=1e-4)
    assert len(chart["loss"]) >= STEPS - 1


def test_an_optimizer_is_not_measured_twice(tmp_path: Path) -> None:
    with sickbay.watch(out=tmp_path / "run") as doctor:
        model = nn.Linear(4, 3)
        optimizer = torch.optim.SGD(model.parameters(), lr=RATE)
        for _ in range(4):
            optimizer.zero_grad()
            nn.functional.cross_entropy(model(torch.randn(8, 4)), torch.randint(0, 3, (8,))).backward()
            optimizer.step()
    places = [(reading.step, reading.where) for reading in doctor.chart()["update_ratio"]]
    assert places and len(places) == len(set(places))


def _first_element_only(weights: dict[str, Tensor], gradients: list[Tensor]) -> dict[str, Tensor]:
    with torch.no_grad():
        for number, (weight, gradient) in enumerate(zip(weights.values(), gradients), 1):
            weight.view(-1)[number] -= RATE * gradient.abs().sum()
    return weights


def _masked(weights: dict[str, Tensor], gradients: list[Tensor]) -> dict[str, Tensor]:
    with torch.no_grad():
        for weight, gradient in zip(weights.values(), gradients):
            weight.view(-1)[::2] -= RATE * gradient.view(-1)[::2]
    return weights


def _first_weight_only(weights: dict[str, Tensor], gradients: list[Tensor]) -> dict[str, Tensor]:
    _in_place({"w": weights["w"]}, gradients[:1])
    return weights


def test_elements_that_a_hand_written_step_leaves_alone_are_counted(tmp_path: Path) -> None:
    def unmoved(update: object, name: str) -> dict[str, list[float]]:
        with sickbay.watch(out=tmp_path / name) as doctor:
            _train(update, width=2, classes=60)
        chart = doctor.chart()
        assert len({reading.step for reading in chart["loss"]}) >= STEPS - 1, "each update ends a step"
        return {where: [reading.value for reading in chart["unmoved_share"].at(where)] for where in chart["unmoved_share"].places()}

    few = unmoved(_first_element_only, "few")
    assert len(few) == 2 and all(len(values) >= 2 for values in few.values()), "both tensors, in several steps"
    assert {round(value * 120) for values in few.values() for value in values} == {119, 118}
    all_of_it = unmoved(_in_place, "all")
    assert {value for values in all_of_it.values() for value in values} == {0.0}
    assert not unmoved(_masked, "masked"), "every other element: gradients masked on purpose"
    assert list(unmoved(_first_weight_only, "frozen").values()) == [[0.0] * len(next(iter(few.values())))], (
        "what stays as a whole is frozen"
    )


def _unused_optimizer(out: Path, update: object, every: int = 1) -> int:
    """How often it is said of an optimizer that never steps that it should have; `update` comes after each `every` backwards instead."""
    torch.manual_seed(0)
    inputs, targets = torch.randn(32, 4), torch.randint(0, 3, (32,))
    weights = {"w": torch.randn(4, 3).requires_grad_(), "b": torch.ones(3).requires_grad_()}
    with sickbay.watch(out=out) as doctor:
        optimizer = torch.optim.Adam(weights.values())
        for step in range(24):
            loss = nn.functional.cross_entropy(inputs @ weights["w"] + weights["b"], targets)
            if step % every == 0:
                optimizer.zero_grad()
                for weight in weights.values():
                    weight.grad = None
            loss.backward()
            if step % every == every - 1:
                weights = update(weights, [weight.grad for weight in weights.values()])  # type: ignore[operator]
    return len(doctor.chart()["backwards_without_step"])


def _through_data(weights: dict[str, Tensor], gradients: list[Tensor]) -> dict[str, Tensor]:
    for weight, gradient in zip(weights.values(), gradients):
        weight.data -= RATE * gradient
    return weights


def _lost(weights: dict[str, Tensor], gradients: list[Tensor]) -> dict[str, Tensor]:
    for weight, gradient in zip(weights.values(), gradients):
        weight = weight - RATE * gradient
    return weights


def _as_they_were(weights: dict[str, Tensor], gradients: list[Tensor]) -> dict[str, Tensor]:
    return {name: weight.detach().clone().requires_grad_() for name, weight in weights.items()}


@pytest.mark.parametrize("every", [1, 4])
@pytest.mark.parametrize("update", [_in_place, _in_their_stead, _through_data])
def test_an_optimizer_beside_updates_by_hand_need_not_step(tmp_path: Path, update: object, every: int) -> None:
    assert _unused_optimizer(tmp_path / "run", update, every) == 0


@pytest.mark.parametrize("update", [_lost, _as_they_were])
def test_updates_by_hand_that_move_nothing_replace_no_step(tmp_path: Path, update: object) -> None:
    assert _unused_optimizer(tmp_path / "run", update) == 1
