"""What one step's graph says of initialisation, data, depth and bounds, against numbers known by hand."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import sickbay
from sickbay.exams.anatomy import Anatomy
from sickbay.exams.structure import examine, examine_function
from sickbay.patient import Patient


def readings(loss: Tensor, *signals: str, model: nn.Module | None = None) -> list[dict[str, Any]]:
    patient = Patient()
    if model is not None:
        patient.roots.add(model)
    return [reading for reading in examine(patient, loss, []) if reading["signal"] in signals]


def scores(classes: int = 4) -> Tensor:
    torch.manual_seed(0)
    return nn.Linear(6, classes)(torch.randn(8, 6))


TARGETS = torch.arange(8) % 4


def floor_of(loss: Tensor) -> float:
    return max(reading["value"] for reading in readings(loss, "loss_floor"))


@pytest.mark.parametrize(
    ("squash", "gap"),
    [
        (lambda z: z.softmax(-1), 1.0),
        (torch.sigmoid, 1.0),
        (torch.tanh, 2.0),
        (lambda z: 3 * torch.tanh(z / 3), 6.0),
        (lambda z: z.clamp(-0.5, 1.5), 2.0),
        (lambda z: -torch.tanh(z).view(8, 4) / 2, 1.0),
    ],
)
def test_the_floor_is_the_cross_entropy_at_the_bound(squash: Any, gap: float) -> None:
    best = torch.zeros(1, 4)
    best[0, 0] = gap
    expected = F.cross_entropy(best, torch.tensor([0])).item()
    assert floor_of(F.cross_entropy(squash(scores()), TARGETS)) == pytest.approx(expected, rel=1e-4)


@pytest.mark.parametrize(
    "healthy",
    [
        lambda z: z,
        lambda z: z.log_softmax(-1),
        lambda z: torch.log(z.softmax(-1)),
        lambda z: nn.Linear(4, 4)(torch.tanh(z)),
        lambda z: torch.tanh(z) * nn.Parameter(torch.ones(1)),
        lambda z: torch.tanh(z) + 50.0 * torch.eye(8, 4),
        lambda z: torch.relu(z),
    ],
)
def test_scores_that_nothing_bounds_have_no_floor(healthy: Any) -> None:
    assert floor_of(F.cross_entropy(healthy(scores()), TARGETS)) == 0


def test_a_wide_soft_cap_leaves_nothing_above_zero() -> None:
    assert floor_of(F.cross_entropy(30 * torch.tanh(scores() / 30), TARGETS)) < 1e-12


def test_binary_cross_entropy_on_a_sigmoid_ends_between_its_two_floors() -> None:
    wanted = torch.tensor([[1.0, 0.0]] * 8)
    expected = (math.log(1 + math.exp(-1)) + math.log(2)) / 2
    assert floor_of(F.binary_cross_entropy_with_logits(torch.sigmoid(scores(2)), wanted)) == pytest.approx(expected, rel=1e-4)
    assert floor_of(F.binary_cross_entropy_with_logits(scores(2), wanted)) == 0


def test_what_nll_loss_is_given_sums_to_one_only_as_log_probabilities() -> None:
    given = {"log": scores().log_softmax(-1), "plain": scores().softmax(-1)}
    sums = {name: readings(F.nll_loss(value, TARGETS), "probability_sum")[0] for name, value in given.items()}
    assert sums["log"]["value"] == pytest.approx(1.0, rel=1e-5)
    assert sums["plain"]["value"] > 4
    assert sums["plain"]["note"]["plain_sum"] == pytest.approx(1.0, rel=1e-5)


def test_the_first_loss_counts_targets_once_whatever_the_reduction() -> None:
    targets = TARGETS.clone()
    targets[:3] = -100
    expected = F.cross_entropy(scores(), targets).item()
    for loss in (F.cross_entropy(scores(), targets, reduction="sum"), 7 * F.cross_entropy(scores(), targets)):
        (reading,) = readings(loss, "initial_loss")
        assert reading["value"] == pytest.approx(expected, rel=1e-5)
        assert reading["note"]["targets"] == 5


class Chain(nn.Module):
    def __init__(self, slope: float) -> None:
        super().__init__()
        self.slope = slope
        self.layers = nn.ModuleList(nn.Linear(4, 4, bias=False) for _ in range(5))
        for layer in self.layers:
            nn.init.eye_(layer.weight)

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = layer(x) * self.slope
        return x


def test_gradients_by_depth_are_those_of_a_chain_in_order_of_use() -> None:
    model = Chain(0.5)
    found = readings(model(torch.ones(1, 4)).sum(), "gradient_by_depth", model=model)
    assert [reading["where"] for reading in found] == [f"layers.{i}.weight" for i in range(5)]
    # Of 4 x 4 ones times 0.5 for each of the five layers; the identity's norm is 2.
    assert [reading["value"] for reading in found] == pytest.approx([4 * 0.5**5 / 2] * 5)


def test_gain_is_the_rms_times_the_root_of_fan_in_however_the_matrix_is_used() -> None:
    wide, tall = nn.Parameter(torch.full((3, 16), 0.5)), nn.Parameter(torch.full((16, 3), 0.5))
    for loss in (F.linear(torch.randn(2, 16), wide).sum(), (torch.randn(2, 16) @ tall).sum()):
        (reading,) = readings(loss, "initial_gain")
        assert reading["note"]["fan_in"] == 16
        assert reading["value"] == pytest.approx(2.0)


def test_random_weights_are_not_taken_for_trained_ones() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(32, 64), nn.ReLU(), nn.Linear(64, 32))
    x = torch.randn(8, 32)
    assert readings(model(x).sum(), "initial_gain", model=model)[0]["note"]["trained"] is False
    with torch.no_grad():
        model[0].weight += 0.2 * torch.randn(64, 1) @ torch.randn(1, 32)
    assert readings(model(x).sum(), "initial_gain", model=model)[0]["note"]["trained"] is True


def test_the_data_is_measured_as_the_first_layer_gets_it() -> None:
    x = torch.full((6, 5), 300.0)
    raw, scaled = nn.Linear(5, 4), nn.Linear(5, 4)
    normed = nn.Sequential(nn.Linear(5, 4), nn.LayerNorm(4))
    (reading,) = readings(raw(x).sum(), "input_rms")
    assert reading["value"] == pytest.approx(300.0)
    assert reading["note"]["normalised"] is False
    assert readings(scaled(x / 300).sum(), "input_rms")[0]["value"] == pytest.approx(1.0)
    assert readings(normed(x).pow(2).sum(), "input_rms")[0]["note"]["normalised"] is True


@pytest.mark.parametrize("loss", [F.mse_loss, lambda out, y: ((y - out) ** 2).mean(), lambda out, y: (out - y).abs().mean()])
def test_targets_are_measured_beside_the_first_output(loss: Any) -> None:
    torch.manual_seed(0)
    out = nn.Linear(5, 1)(torch.randn(6, 5)) * 2.0
    (reading,) = readings(loss(out, torch.full((6, 1), 300.0)), "target_rms")
    assert reading["value"] == pytest.approx(300.0, rel=1e-4)
    assert reading["note"]["output_rms"] == pytest.approx(out.detach().pow(2).mean().sqrt().item(), rel=1e-3)


def test_clones_are_units_whose_gradient_is_alike_too() -> None:
    torch.manual_seed(0)
    x = torch.randn(6, 5)
    first, second = nn.Linear(5, 4), nn.Linear(4, 2)
    nn.init.constant_(first.weight, 0.1)
    nn.init.zeros_(first.bias)
    (told_apart,) = _clones(first, second, x)
    assert told_apart["note"]["constant"]
    assert told_apart["value"] == 0, "a random second layer tells the units apart"
    nn.init.constant_(second.weight, 0.1)
    assert [reading["value"] for reading in _clones(first, second, x)] == [1.0]


def _clones(first: nn.Linear, second: nn.Linear, x: Tensor) -> list[dict[str, Any]]:
    found = readings(second(torch.tanh(first(x))).pow(2).sum(), "clone_units", model=nn.Sequential(first, second))
    return [reading for reading in found if reading["where"] == "0.weight"]


def test_a_function_of_a_dict_is_looked_at_under_its_own_names() -> None:
    weights = {"enter": torch.randn(5, 4), "leave": torch.randn(4, 3)}

    def objective(p: dict[str, Tensor], x: Tensor, y: Tensor) -> Tensor:
        return F.cross_entropy(torch.tanh(x @ p["enter"]) @ p["leave"], y)

    found = examine_function(objective, (weights, 100 * torch.randn(6, 5), torch.arange(6) % 3), {})
    assert {reading["where"] for reading in found if reading["signal"] == "gradient_by_depth"} == {"enter", "leave"}
    assert next(reading["value"] for reading in found if reading["signal"] == "input_rms") > 50
    assert all(weight.grad is None and not weight.requires_grad for weight in weights.values())


def test_weights_used_through_casts_and_turns_are_found() -> None:
    weight = nn.Parameter(torch.randn(4, 6))
    x = torch.randn(2, 3, 6, dtype=torch.float64)
    anatomy = Anatomy(torch.einsum("btd,ed->bte", x, weight.double()).sum())
    assert [found.tensor is weight for found in anatomy.weights] == [True]


def test_a_second_training_is_looked_at_from_its_first_step(tmp_path: Path) -> None:
    """Its optimizer is a new one; what the first loss of the run was is not asked again."""
    first, second = nn.Linear(6, 4), nn.Sequential(nn.Linear(6, 4), nn.Softmax(-1))
    with sickbay.watch(out=tmp_path / "run") as doctor:
        for model, steps in ((first, 9), (second, 3)):
            optimizer = torch.optim.SGD(model.parameters(), lr=1e-3)
            for _ in range(steps):
                F.cross_entropy(model(torch.randn(8, 6)), torch.randint(4, (8,))).backward()
                optimizer.step()
                optimizer.zero_grad()
    floors = {reading.step: reading.value for reading in doctor.chart()["loss_floor"]}
    assert floors[0] == 0 and floors[9] > 0.3
    assert [reading.step for reading in doctor.chart()["initial_loss"]] == [0]
