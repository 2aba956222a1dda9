"""Shapes of learning rates against curves whose plan is known by construction, and the conditions that read them."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.optim import lr_scheduler as schedulers

import sickbay
from sickbay.conditions.convergence import missing_warmup
from sickbay.core.chart import Chart, Reading
from sickbay.core.condition import checkup
from sickbay.core.diagnosis import Diagnosis, NotExamined
from sickbay.core.rates import Plan, Rates, plan_of_function
from sickbay.probes.schedule_plan import plan_of
from sickbay.registry import conditions
from tests.charts import chart

LINE = "train.py:7"


def cosine(length: int) -> Callable[[int], float]:
    return lambda step: 0.5 * (1 + math.cos(math.pi * step / length))


def warm(length: int, after: Callable[[int], float]) -> Callable[[int], float]:
    return lambda step: (step + 1) / length if step < length else after(step - length)


CURVES: list[tuple[Callable[[int], float], Plan]] = [
    (lambda step: max(0.0, 1 - step / 150), Plan("decay", 150, 0)),
    (cosine(200), Plan("decay", 200, 0)),
    (warm(20, lambda step: cosine(180)(min(step, 180))), Plan("decay", 200, 19)),
    (lambda step: min(1.0, (step + 1) / 15) * cosine(120)(step), Plan("decay", 120, 14)),  # at 240 it is higher than after the warm-up
    (lambda step: 1.0, Plan("constant", None, 0)),
    (lambda step: min(1.0, step / 50), Plan("constant", None, 50)),
    (lambda step: 0.95**step, Plan("decay", None, 0)),
    (lambda step: 0.1 ** (step // 30), Plan("decay", None, 0)),
    (lambda step: cosine(400)(step % 400), Plan("restarts", None, 0)),
    (lambda step: 1 - abs((step % 100) / 50 - 1), Plan("restarts", None, 50)),
    (lambda step: 0.0, Plan("unknown")),
    (lambda step: math.nan, Plan("unknown")),
]


@pytest.mark.parametrize(("function", "plan"), CURVES)
def test_the_plan_behind_a_function(function: Callable[[int], float], plan: Plan) -> None:
    assert plan_of_function(function) == plan


def test_a_function_that_refuses_late_steps_is_asked_no_further() -> None:
    table = [1 - step / 100 for step in range(100)]
    assert plan_of_function(lambda step: table[step]).kind == "decay"


def optimizer() -> torch.optim.Optimizer:
    return torch.optim.SGD([torch.nn.Parameter(torch.zeros(2))], lr=0.1)


def joined(o: torch.optim.Optimizer) -> Any:
    return schedulers.SequentialLR(o, [schedulers.LinearLR(o, 0.01, total_iters=50), schedulers.CosineAnnealingLR(o, 150)], [50])


def library(o: torch.optim.Optimizer) -> Any:
    transformers = pytest.importorskip("transformers")
    return transformers.get_linear_schedule_with_warmup(o, 10, 34)


BUILT: list[tuple[Callable[[Any], Any], Plan]] = [
    (lambda o: schedulers.CosineAnnealingLR(o, 100), Plan("decay", 100, 0)),
    (lambda o: schedulers.OneCycleLR(o, 0.1, total_steps=200), Plan("decay", 200, 59)),
    (lambda o: schedulers.PolynomialLR(o, 70), Plan("decay", 70, 0)),
    (lambda o: schedulers.LinearLR(o, 1.0, 0.1, total_iters=40), Plan("decay", 40, 0)),
    (lambda o: schedulers.LinearLR(o, 0.1, 1.0, total_iters=40), Plan("constant", None, 40)),
    (lambda o: schedulers.MultiStepLR(o, [30, 60]), Plan("decay", 60, 0)),
    (lambda o: schedulers.StepLR(o, 30), Plan("decay", None, 0)),
    (lambda o: schedulers.ReduceLROnPlateau(o), Plan("metric")),
    (lambda o: schedulers.CosineAnnealingWarmRestarts(o, 10), Plan("restarts")),
    (lambda o: schedulers.LambdaLR(o, functools.partial(pow, 0.5)), Plan("unknown")),
    (joined, Plan("decay", 200, 50)),
    (library, Plan("decay", 34, 10)),
]


@pytest.mark.parametrize(("build", "plan"), BUILT)
def test_the_plan_of_a_scheduler(build: Callable[[Any], Any], plan: Plan) -> None:
    assert plan_of(build(optimizer()), lambda function: Plan("unknown")) == plan


def series(function: Callable[[int], float], steps: int) -> Rates:
    rates = Rates.of([(step, function(step)) for step in range(steps)])
    assert rates is not None
    return rates


def test_only_a_mirrored_wave_rises_again() -> None:
    assert series(cosine(100), 180).rises_again() == (100, 179, pytest.approx(cosine(100)(179)))
    for healthy in (lambda s: 1 - abs((s % 100) / 50 - 1), lambda s: cosine(100)(s % 100), lambda s: max(0.0, 1 - s / 90), lambda s: 1.0):
        assert series(healthy, 180).rises_again() is None


def test_a_tail_and_a_straight_rise() -> None:
    assert series(lambda step: max(0.0, 1 - step / 100), 250).tail_below(1e-3)[:2] == (100, 150)
    assert series(lambda step: 1.0, 50).tail_below(1e-3)[1] == 0
    assert series(lambda step: step / 300, 200).straight_rise()
    assert not series(lambda step: min(1.0, step / 190), 200).straight_rise()
    assert not series(lambda step: 10 ** (step / 40), 200).straight_rise()
    assert Rates.of([(0, 1.0), (0, 2.0), (1, 1.0)]) is None


# --- conditions ---------------------------------------------------------------------------------------------------------
def rates(function: Callable[[int], float], steps: int, peak: float = 1e-3) -> list[Reading]:
    return [Reading(step, "learning_rate", peak * function(step), source=LINE) for step in range(steps)]


def scheduler(taken: float, updates: int, moves: int | None = None, name: str = "CosineAnnealingLR", **note: Any) -> Reading:
    known = {"planned": None, "warmup": 0, "kind": "decay", "called": "", "own_loop": False, "unreached": "", "stopped": False}
    moved = (updates if taken else 0) if moves is None else moves
    return Reading(
        updates, "scheduler_steps", taken, name, {**known, "updates": updates, "moves": moved, "optimizer": LINE, **note}, "train.py:9"
    )


def ask(id_: str, record: Chart) -> Diagnosis | NotExamined | None:
    result = checkup(record, [conditions()[id_]])
    broken = [reason for reason in result.unexamined.values() if "its rule failed" in reason]
    assert not broken, broken
    return result.diagnoses[0] if result.diagnoses else NotExamined(result.unexamined[id_]) if result.unexamined else None


def schedule(function: Callable[[int], float], steps: int, *planned: Reading, **more: Any) -> Diagnosis | NotExamined | None:
    return ask("schedule-misconfigured", chart(learning_rate=rates(function, steps), scheduler_steps=list(planned), **more))


ROWS = Reading(0, "batch_rows", 32, note={"promised": 32, "batches": 1})
SICK = [
    ("never stepped", lambda: schedule(lambda s: 1.0, 60, scheduler(0, 60, own_loop=True, planned=60))),
    ("as per epoch", lambda: schedule(lambda s: 1.0, 60, scheduler(3, 60, 3, planned=60))),
    ("as if planned in epochs", lambda: schedule(cosine(5), 60, scheduler(60, 60, planned=5))),
    ("2 times per update", lambda: schedule(cosine(30), 60, scheduler(120, 60, planned=60))),
    ("4 times the 60 updates", lambda: schedule(cosine(240), 60, scheduler(60, 60, planned=240), backwards_since_step=[4.0] * 60)),
    ("number of rows in a batch", lambda: schedule(cosine(1920), 60, scheduler(60, 60, planned=1920), batch_rows=[ROWS])),
    ("longer than the run", lambda: schedule(lambda s: s / 500, 60, scheduler(60, 60, planned=60, warmup=500))),
    ("longer than the run", lambda: schedule(lambda s: s / 500, 60, scheduler(60, 60, planned=60, warmup=500, kind="restarts"))),
    ("longer than the run", lambda: schedule(lambda s: s / 500, 60, update_ratio=[1e-4] * 60)),
    ("longer than the run", lambda: schedule(lambda s: s / 500, 60, update_ratio={0: 0.0, 16: 1e-4})),
    ("turns round", lambda: schedule(cosine(40), 70)),
    ("40 of 60 steps", lambda: schedule(lambda s: max(0.0, 1 - s / 20), 60)),
    ("below zero", lambda: schedule(lambda s: 1 - s / 40, 60)),
    ("in all 60 steps", lambda: schedule(lambda s: 0.0, 60)),
]
HEALTHY = [
    lambda: schedule(lambda s: 1.0, 60, scheduler(0, 60, own_loop=True, planned=60, unreached="train.py:30")),
    lambda: schedule(lambda s: 1.0, 60, scheduler(0, 60, own_loop=False, planned=60)),
    lambda: schedule(lambda s: 1.0, 60, scheduler(0, 60, own_loop=True, kind="constant")),
    lambda: schedule(lambda s: 1.0, 60, scheduler(3, 60, 3, planned=100)),
    lambda: schedule(cosine(400), 60, scheduler(60, 60, planned=400)),
    lambda: schedule(cosine(1800), 60, scheduler(60, 60, planned=1800), batch_rows=[ROWS]),
    lambda: schedule(lambda s: s / 500, 60, scheduler(60, 60, planned=10_000, warmup=500), update_ratio=[0.02] * 60),
    lambda: schedule(lambda s: (s / 500) ** 2, 60, scheduler(60, 60, planned=2000, warmup=500), update_ratio=[1e-3] * 60),
    lambda: schedule(lambda s: s / 500, 60, update_ratio={0: 0.0, 16: 4e-3}),
    lambda: schedule(lambda s: s / 500, 60, update_ratio={0: 0.0}),
    lambda: schedule(cosine(30), 60, scheduler(60, 60, kind="restarts")),
    lambda: schedule(lambda s: s / 500, 60, scheduler(60, 60, planned=600, warmup=500, kind="restarts")),
    lambda: schedule(cosine(60), 60, scheduler(60, 60, planned=60)),
    lambda: schedule(lambda s: max(0.1, cosine(40)(min(s, 40))), 60, scheduler(60, 60, planned=40)),
    lambda: schedule(lambda s: 1e-4 if s > 30 else 1.0, 60),
    lambda: schedule(lambda s: 10 ** (s / 20), 60),
]


@pytest.mark.parametrize(("words", "judged"), SICK)
def test_a_misconfigured_schedule_is_called_by_its_variant(words: str, judged: Callable[[], Any]) -> None:
    verdict = judged()
    assert isinstance(verdict, Diagnosis), verdict
    assert words in verdict.summary
    assert verdict.source


@pytest.mark.parametrize("judged", HEALTHY)
def test_schedules_on_purpose_and_runs_cut_short_are_silent(judged: Callable[[], Any]) -> None:
    assert judged() is None


def test_a_short_run_has_no_schedule_to_judge() -> None:
    assert isinstance(schedule(lambda s: 1.0, 5), NotExamined)


def gain(step: int, loss: float, losses: dict[str, float], rate: float = 1e-3) -> Reading:
    best = min(losses, key=lambda multiple: losses[multiple])
    note = {"losses": losses, "best": float(best), "loss": loss, "rate": rate, "ratio": 1e-5}
    return Reading(step, "step_gain", (loss - losses["1"]) / loss, note=note, source="train.py:20")


FURTHER = {"1": 3.0996, "10": 3.096, "100": 3.05, "1000": 2.8}


def low(losses: list[float], *tried: Reading, ratio: float = 1e-5) -> Diagnosis | NotExamined | None:
    steps = len(losses)
    record = chart(
        learning_rate=rates(lambda s: 1.0, steps), loss=losses, chance_loss=[3.2], update_ratio=[ratio] * steps, step_gain=list(tried)
    )
    return ask("learning-rate-too-low", record)


def test_a_rate_is_too_low_where_the_same_direction_leads_much_further() -> None:
    verdict = low([3.1] * 60, gain(8, 3.1, FURTHER), gain(24, 3.1, FURTHER))
    assert isinstance(verdict, Diagnosis)
    assert "1000 times" in verdict.summary
    assert (verdict.step, verdict.source) == (8, LINE)


def test_where_answers_are_yes_or_no_their_frequency_is_what_guessing_gives() -> None:
    losses, small = [0.69 + noise(step) / 100 for step in range(60)], {"1": 0.689999, "10": 0.68999, "100": 0.6899, "1000": 0.689}
    readings = {
        "learning_rate": rates(lambda s: 1.0, 60),
        "update_ratio": [1e-7] * 60,
        "step_gain": [gain(8, 0.69, small), gain(16, 0.69, small)],
    }
    found = ask("learning-rate-too-low", chart(loss=losses, frequency_loss=[0.692, 0.693], **readings))
    assert isinstance(found, Diagnosis)
    assert ask("learning-rate-too-low", chart(loss=losses, **readings)) is None, "what guessing gives is not known"
    assert ask("learning-rate-too-low", chart(loss=losses, frequency_loss=[2.0], **readings)) is None, "much was learned before"


def test_small_steps_are_right_where_longer_ones_gain_little_or_the_run_moves() -> None:
    fitted = {"1": 3.0999, "10": 3.0995, "100": 3.11, "1000": 9.0}
    assert low([3.1] * 60, gain(8, 3.1, fitted)) is None
    assert low([3.1 - 0.02 * s for s in range(60)], gain(8, 3.1, FURTHER)) is None
    assert low([0.7] * 60, gain(8, 0.7, {"1": 0.6999, "10": 0.699, "100": 0.69, "1000": 0.5})) is None
    assert low([3.1] * 60, ratio=1e-3) is None
    assert isinstance(low([3.1] * 60, gain(8, 3.1, FURTHER, rate=1e-4)), NotExamined), "tried in the warm-up only"
    assert isinstance(low([3.1] * 20, gain(8, 3.1, FURTHER)), NotExamined)


def start(losses: list[float], tried: list[Reading], shape: Callable[[int], float] = lambda s: 1.0) -> Diagnosis | NotExamined | None:
    record = chart(learning_rate=rates(shape, len(losses)), loss=losses, chance_loss=[3.2], step_gain=tried)
    return ask("missing-warmup", record)


def test_missing_warmup_needs_an_overshoot_and_its_harm() -> None:
    thrown = [3.2, 6.0, 7.0, 6.5, 5.0, *[3.0 - 0.02 * s for s in range(60)]]
    overshot = [gain(1, 3.2, {"0.01": 3.19, "0.1": 3.1, "1": 6.0})]
    verdict = start(thrown, overshot)
    assert isinstance(verdict, Diagnosis)
    assert verdict.certainty == "suspected"
    assert isinstance(start([3.2, *[3.21] * 120], overshot), Diagnosis), "stuck at a uniform guess"
    assert start(thrown, []) is None
    assert start(thrown, [gain(1, 3.2, {"0.01": 3.1, "0.1": 3.3, "1": 6.0})]) is None, "too high altogether"
    assert start(thrown, [*overshot, gain(32, 3.2, {"0.01": 3.19, "0.1": 3.1, "1": 6.0})]) is None, "later steps overshoot too"
    assert start(thrown, overshot, lambda s: min(1.0, (s + 1) / 10)) is None
    assert start([3.2 - 0.02 * s for s in range(60)], overshot) is None
    assert isinstance(start(thrown[:20], overshot), NotExamined)


@pytest.mark.parametrize(("first", "explained"), [(0.01, True), (1e-5, False)], ids=["reached at first", "never reached"])
def test_a_gradient_that_faded_since_its_first_step_is_the_missing_warmups_doing(first: float, explained: bool) -> None:
    values = [first] * 4 + [0.1] * 4
    depth = [Reading(0, "gradient_by_depth", v, f"h.{i}", note={"depth": i, "size": 1.0}) for i, v in enumerate(values)]
    overshot = [gain(1, 3.2, {"0.01": 3.19, "0.1": 3.1, "1": 6.0})]
    stuck = chart(
        loss=[3.2, *[3.21] * 120], learning_rate=rates(lambda s: 1.0, 121), chance_loss=[3.2], step_gain=overshot, gradient_by_depth=depth
    )
    found = missing_warmup.diagnose(stuck)
    assert isinstance(found, Diagnosis)
    assert ("vanishing-gradients" in found.explains) == explained


def plateau(losses: list[float], **more: Any) -> Diagnosis | NotExamined | None:
    return ask("loss-plateau", chart(loss=losses, chance_loss=[3.2], **more))


def noise(step: int) -> float:
    return 0.02 * ((7 * step) % 11 - 5) / 5


def test_a_plateau_at_guessing_after_enough_steps() -> None:
    stuck = [3.2 + noise(step) for step in range(160)]
    assert isinstance(plateau(stuck), Diagnosis)
    assert isinstance(plateau(stuck[:60]), NotExamined)
    assert isinstance(plateau(stuck, learning_rate=rates(lambda s: 1.0 if s < 60 else 0.0, 160)), NotExamined), "the schedule ended it"
    assert plateau([3.2 - 0.002 * step + noise(step) for step in range(160)]) is None
    assert plateau([1.0 + noise(step) for step in range(160)]) is None
    assert isinstance(ask("loss-plateau", chart(loss=stuck)), NotExamined), "nobody knows what guessing gives"
    counted = [Reading(step, "ngram_loss", 0.9, note={"unigram": 3.2}) for step in range(20)]
    verdict = plateau([2.3 + noise(step) for step in range(160)], ngram_loss=counted)
    assert isinstance(verdict, Diagnosis)
    assert verdict.severity == "note"


def test_clipping_is_saturated_above_nine_tenths_of_the_steps() -> None:
    def clipped(values: list[float]) -> Diagnosis | NotExamined | None:
        return ask(
            "clipping-saturated", chart(clip_norm=[Reading(s, "clip_norm", v, note={"max_norm": 1.0}) for s, v in enumerate(values)])
        )

    verdict = clipped([5.0] * 80)
    assert isinstance(verdict, Diagnosis)
    assert verdict.severity == "note"
    assert clipped([1.5] * 80) is None
    assert clipped([5.0, 0.5] * 40) is None
    assert isinstance(clipped([5.0] * 20), NotExamined)


def test_a_scheduler_built_over_a_wrapper_counts_the_steps_of_the_optimizer_inside(tmp_path: Path) -> None:
    class Wrapper(torch.optim.Optimizer):  # the way accelerate wraps one
        def __init__(self, optimizer: torch.optim.Optimizer) -> None:
            self.optimizer, self.defaults, self.state = optimizer, optimizer.defaults, optimizer.state

        @property
        def param_groups(self) -> Any:
            return self.optimizer.param_groups

        def step(self, closure: Any = None) -> None:
            self.optimizer.step()

    with sickbay.watch(out=tmp_path / "run") as watch:
        model = torch.nn.Linear(4, 2)
        inside = torch.optim.SGD(model.parameters(), lr=0.1)
        wrapper = Wrapper(inside)
        scheduler = torch.optim.lr_scheduler.LambdaLR(wrapper, lambda step: min(1.0, step / 500))
        for _ in range(12):
            model(torch.randn(3, 4)).square().mean().backward()
            wrapper.step()
            inside.zero_grad()
            scheduler.step()
    (seen,) = watch.chart()["scheduler_steps"]
    assert (seen.value, seen.note["updates"], seen.note["moves"]) == (12, 12, 12)
