"""The confusion test: each planted fault is named first and nothing unrelated beside it; healthy variants raise no alarm."""

from __future__ import annotations

import math

import pytest
from detection import Outcome, observe, plant
from healthy_reference import variants

from sickbay.reference.case import Case
from sickbay.registry import conditions

STEPS = 40  # enough for every fault but those that need a history of their own, which set it themselves
PLANTED = [condition for condition in conditions().values() if condition.inject]
# A few that differ most from one another; bench/detection.py runs them all.
HEALTHY = (
    "seed 1",
    "1 step",
    "3 steps",
    "post-norm, LayerNorm, learned positions",
    "Llama: RMSNorm, rotary, SwiGLU, untied",
    "ReLU",
    "dropout 0.1",
    "SGD with momentum",
    "bf16 autocast, accumulation 2",
    "GradScaler, unscaled before clipping",
    "summed loss, not clipped",
    "warm restarts",
    "LoRA",
    "packed documents",
    "rows of all lengths, accumulation 4",
)


@pytest.fixture(autouse=True)
def questions_cost_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    """On a busy machine fewer questions are asked of so short a run; what is tested here is the answers."""
    monkeypatch.setattr("sickbay.examiner._CHEAP", math.inf)
    monkeypatch.setattr("sickbay.probes.purse.Purse.affords", lambda purse: True)


@pytest.mark.parametrize("id_", [condition.id for condition in PLANTED])
def test_a_planted_fault_is_named_first_and_nothing_unrelated(id_: str) -> None:
    seen = plant(conditions()[id_], Case(steps=STEPS))
    assert seen.broken == ()
    assert id_ in seen.named
    before = seen.named[: seen.named.index(id_)]
    assert before == () or seen.alarms == ()  # among notes, those that the healthy tiny model earns as well may come first
    assert seen.unrelated == ()


@pytest.mark.parametrize("name", HEALTHY)
def test_a_healthy_variant_raises_no_alarm(name: str) -> None:
    seen = observe(variants(STEPS)[name])
    assert seen.alarms == ()
    assert seen.broken == ()


def test_the_test_can_fail() -> None:
    """An unrelated finding and a missed one are seen as such."""
    stray = Outcome("causal-leak", ("data-repeats", "causal-leak"), (), ("data-repeats", "causal-leak"), 1, 0.0, ())
    assert stray.rank == 2
    assert stray.unrelated == ("data-repeats",)
    assert Outcome("causal-leak", (), (), (), None, 0.0, ()).rank is None
