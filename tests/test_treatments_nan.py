"""The treatments that act on a live run do what they say, on optimizers whose steps are known by hand, and undo it wholly."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from torch import nn

from sickbay.core.treatment import Treatment
from sickbay.registry import treatments


def patient(learning_rate: float = 0.5) -> tuple[SimpleNamespace, nn.Parameter, torch.optim.SGD]:
    """One weight vector `(2,)` of zeros under SGD."""
    weight = nn.Parameter(torch.zeros(2))
    optimizer = torch.optim.SGD([weight], lr=learning_rate)
    return SimpleNamespace(optimizers=[optimizer], root=None), weight, optimizer


def step(weight: nn.Parameter, optimizer: torch.optim.Optimizer, gradient: list[float]) -> list[float]:
    """One optimizer step with `gradient`; how the weight moved."""
    before = weight.detach().clone()
    weight.grad = torch.tensor(gradient)
    optimizer.step()
    moved: list[float] = (weight.detach() - before).tolist()
    return moved


def test_clip_gradients_bounds_the_global_norm() -> None:
    sick, weight, optimizer = patient()
    undo = treatments()["clip-gradients"].on(sick, max_norm=1.0)
    assert step(weight, optimizer, [3.0, 4.0]) == pytest.approx([-0.3, -0.4], rel=1e-4)
    assert step(weight, optimizer, [0.3, 0.4]) == pytest.approx([-0.15, -0.2])
    undo()
    assert step(weight, optimizer, [3.0, 4.0]) == pytest.approx([-1.5, -2.0])


def test_lower_learning_rate_keeps_the_schedule() -> None:
    sick, weight, optimizer = patient()
    schedule = torch.optim.lr_scheduler.StepLR(optimizer, step_size=1, gamma=0.5)
    undo = treatments()["lower-learning-rate"].on(sick)
    assert step(weight, optimizer, [1.0, 0.0]) == pytest.approx([-0.05, 0.0])
    assert optimizer.param_groups[0]["lr"] == 0.5, "the script still sees its own rate"
    schedule.step()
    assert step(weight, optimizer, [1.0, 0.0]) == pytest.approx([-0.025, 0.0])
    undo()
    assert step(weight, optimizer, [1.0, 0.0]) == pytest.approx([-0.25, 0.0])


def test_zero_gradients_drops_them_after_the_step() -> None:
    sick, weight, optimizer = patient()
    undo = treatments()["zero-gradients"].on(sick)
    step(weight, optimizer, [1.0, 0.0])
    assert weight.grad is None
    undo()
    step(weight, optimizer, [1.0, 0.0])
    assert weight.grad is not None


def test_drop_bad_samples_leaves_the_weights_alone() -> None:
    sick, weight, optimizer = patient()
    undo = treatments()["drop-bad-samples"].on(sick)
    assert step(weight, optimizer, [float("nan"), 1.0]) == [0.0, 0.0]
    assert step(weight, optimizer, [float("inf"), 1.0]) == [0.0, 0.0]
    assert step(weight, optimizer, [2.0, 0.0]) == [-1.0, 0.0]
    undo()
    assert step(weight, optimizer, [float("inf"), 0.0])[0] == float("-inf")


def test_skip_spike_batch_judges_by_the_runs_own_median() -> None:
    sick, weight, optimizer = patient()
    undo = treatments()["skip-spike-batch"].on(sick)
    assert step(weight, optimizer, [500.0, 0.0]) == [-250.0, 0.0], "nothing is judged before there is a history"
    for _ in range(20):
        step(weight, optimizer, [1.0, 0.0])
    assert step(weight, optimizer, [10.0, 0.0])[0] == pytest.approx(-5.0), "exactly ten times"
    assert step(weight, optimizer, [11.0, 0.0]) == [0.0, 0.0]
    assert step(weight, optimizer, [float("nan"), 0.0]) == [0.0, 0.0]
    undo()
    assert step(weight, optimizer, [11.0, 0.0])[0] == pytest.approx(-5.5, rel=1e-4)


ADVICE = [treatment for treatment in treatments().values() if treatment.safety == "advice"]


@pytest.mark.parametrize("treatment", ADVICE, ids=[treatment.id for treatment in ADVICE])
def test_advice_refuses_to_act(treatment: Treatment) -> None:
    with pytest.raises(ValueError, match=f"{treatment.id} is advice"):
        treatment.on(patient()[0])
