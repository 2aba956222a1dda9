"""The learning-rate schedule does not do what it was built for: never stepped, stepped in other units than planned, or over too early.

Looks like
The learning rate stays where it started, or hardly leaves its warm-up; or it is zero long before the end and the loss stands still;
or it comes down, turns round and rises again, and the loss with it.

Why
A schedule counts its own steps. Built for batches and stepped once an epoch it barely moves; built for epochs and stepped every batch
it is over at once; built before the data are shared out among processes, or before gradients are accumulated, it is longer than the
run by that factor. A cosine without a clamp turns round when its time is over.

Tell apart
Warm restarts and cyclic schedules jump or go to and fro on purpose; ReduceLROnPlateau follows the loss. A run that is stopped early
leaves the rest of its plan undone, which is no fault. learning-rate-too-low: the rate is the one that was asked for.

Cure
Count optimizer steps once (batches per epoch / accumulation * epochs, after sharding), give that number to the scheduler, and call
`scheduler.step()` right after each `optimizer.step()`. A schedule of one's own clamps its progress to 1.

Sources
torch.optim docs, "How to adjust learning rate": the order and the unit of `scheduler.step()`. Loshchilov & Hutter 2017 (SGDR): restarts
are jumps. Accelerate docs, "Learning rate scheduler": a prepared scheduler steps num_processes times.
"""

from __future__ import annotations

from typing import Any

from sickbay.core.chart import Chart, Reading
from sickbay.core.condition import Condition
from sickbay.core.diagnosis import Diagnosis, Evidence, NotExamined, Severity, Threshold, number
from sickbay.core.rates import Rates

NOTHING = Threshold(1.01e-3, "share of highest rate", source="three decades below: at a thousandth of the step nothing is learned any more")
IDLE = Threshold(0.25, "share of the run", source="cosine spends 2 %, a cubic decay 10 % of its steps below a thousandth of its rate")
MISSED = Threshold(1 / 3, "share of the plan", source="a run that did a third of its plan was stopped early, or counts in another unit")
UNIT = Threshold(0.1, "relative", source="plan and optimizer steps agree but for a last partial batch per epoch")
EXACT = Threshold(
    0.03, "relative", source="a plan in micro-batches is the optimizer steps times their number, but for one partial cycle per epoch"
)
OVER = Threshold(1.25, "x plan", source="runs go on for a few steps after their plan; a quarter more is another count")
SUDDEN = Threshold(0.01, "share of rate before", source="a phase of its own begins with a rate set by hand, a schedule has no such cliff")
ORDINARY = Threshold(0.01, "ratio", source="the guide's upper end of healthy updates: a rising rate that reached it was a range test")
RAMP_SHARE = Threshold(0.6, "share of the plan", source="recipes warm up for 1 to 10 % of their steps, OneCycle for 30 %")
FLOOR = Threshold(0.11, "share of highest rate", source="min_lr of the usual recipes is a tenth of the peak")
FEW, MANY, LONG = 10, 50, 100  # optimizer steps: the fewest judged; for a ramp or an idle end; for a run far beyond its plan
WAVES = 3  # falls of a schedule written by hand, from which on they are cycles on purpose


def diagnose(chart: Chart) -> Diagnosis | NotExamined | None:
    by_optimizer: dict[str, list[tuple[int, float]]] = {}
    for reading in chart["learning_rate"]:
        by_optimizer.setdefault(reading.source, []).append((reading.step, reading.value))
    told = [found for scheduler in chart["scheduler_steps"] if (found := _against_plan(chart, scheduler, by_optimizer)) is not None]
    if not told and max(map(len, by_optimizer.values())) < FEW:
        return NotExamined(f"the run has fewer than {FEW} steps of one optimizer")
    for source, pairs in by_optimizer.items():
        rates = Rates.of(pairs)
        kinds = {reading.note.get("kind") for reading in chart["scheduler_steps"] if reading.note.get("optimizer") == source}
        if not told and rates is not None and len(pairs) >= FEW and not kinds & {"restarts", "metric"}:
            told += [found for found in (_by_shape(chart, rates, source),) if found is not None]
    return told[0] if told else None


def _against_plan(chart: Chart, scheduler: Reading, by_optimizer: dict[str, list[tuple[int, float]]]) -> Diagnosis | None:
    """What a torch scheduler did beside what it was built for."""
    note, taken = scheduler.note, scheduler.value
    updates, moves, planned, warmup = note["updates"], note["moves"], note["planned"] or 0, note["warmup"] or 0
    rates = Rates.of(by_optimizer.get(note["optimizer"], ()))
    if updates < FEW or rates is None or note["kind"] in ("metric", "unknown"):
        return None
    if taken == 0 and rates.constant() and note["kind"] != "constant" and note["own_loop"] and not note["unreached"]:
        return _found(scheduler, f"{scheduler.where} is built and never stepped: {updates} updates at one rate", 0, rates)
    built = f"{scheduler.where} was built for {planned:,.0f} steps"
    seldom = 0 < moves <= updates * MISSED and taken <= 2 * moves
    if seldom and planned and abs(planned / updates - 1) <= UNIT and taken <= MISSED * planned:
        text = f"{built}, which is the run's number of batches, and was stepped {taken:.0f} times, as per epoch"
        return _found(scheduler, text, 0, rates)
    if seldom and warmup >= 2 * FEW and taken <= MISSED * warmup and updates >= warmup:
        text = f"{scheduler.where} warms up for {warmup} steps and was stepped {taken:.0f} times in {updates} updates, as per epoch"
        return _found(scheduler, text, 0, rates)
    # A cosine whose warm-up is longer than its plan swings from step to step after it, which looks like restarts.
    waves = note["kind"] == "restarts" and not (planned and warmup > max(planned, taken))
    if seldom or note["stopped"] or waves:
        return None
    return _length_wrong(chart, scheduler, rates, built)


def _length_wrong(chart: Chart, scheduler: Reading, rates: Rates, built: str) -> Diagnosis | None:
    """The scheduler is stepped with the optimizer, and its plan is longer or shorter than the run by a count that can be named."""
    note, taken = scheduler.note, scheduler.value
    updates, planned, warmup = note["updates"], note["planned"] or 0, note["warmup"] or 0
    each = round(taken / updates)
    if warmup > taken and updates >= FEW and planned and warmup >= RAMP_SHARE * planned:
        text = f"{scheduler.where} warms up for {warmup} of the {planned:,.0f} steps it was built for: the warm-up is longer than the run"
        return _found(scheduler, text, 0, rates)
    micro = round(chart["backwards_since_step"].median()) if len(chart["backwards_since_step"]) else 1
    world = int(chart.facts.get("world_size", 1) or 1)
    rows = max((int(reading.note.get("promised") or 0) for reading in chart["batch_rows"]), default=1)
    counts = ((world, "processes"), (micro, "micro-batches of a step"), (world * micro, "processes and micro-batches"))
    for count, what in (*counts, (rows, "rows in a batch")):
        if count > 1 and each == 1 and planned and abs(planned / updates / count - 1) <= EXACT:
            text = f"{built}, {count} times the {updates} updates: the number of {what} was counted in"
            return _found(scheduler, text, 0, rates)
    if not planned or taken < OVER * planned or note["kind"] != "decay":
        return None
    end = int(rates.steps[0] + updates * planned / taken)
    why = f"it was stepped {each} times per update" if each > 1 else "it is stepped per batch, as if planned in epochs"
    late = rates.values[rates.steps > end]
    if len(late) and late.max() > 2 * NOTHING * rates.peak and late.max() > 2 * rates.at(end) and late.max() > 0.2 * rates.peak:
        why = why if each > 1 or planned * FEW <= updates else "its cosine is not clamped"
        return _found(scheduler, f"{built}; from step {end} on the rate rises again to {number(late.max())}: {why}", end, rates)
    length = f"{updates:,} updates"
    if len(late) and late.max() <= NOTHING * rates.peak and updates - end >= max(2 * FEW, IDLE * updates):
        return _found(scheduler, f"{built}; from step {end} of {length} on the rate is {number(late.max())}", end, rates)
    wrong_unit = (each > 1 and abs(planned / updates - 1) <= UNIT) or (planned * FEW <= updates and updates - planned >= LONG)
    if len(late) and late.max() <= FLOOR * rates.peak and wrong_unit:
        return _found(scheduler, f"{built}; from step {end} of {length} on the rate stays at its floor: {why}", end, rates)
    return None


def _by_shape(chart: Chart, rates: Rates, source: str) -> Diagnosis | None:
    """What the learning rates show by themselves, whoever set them."""
    where = Reading(int(rates.steps[-1]), "learning_rate", float(rates.values[-1]), source=source)
    if rates.peak <= 0:
        return _found(where, f"the learning rate is {number(rates.peak)} in all {len(rates.values)} steps", 0, rates, "critical")
    if float(rates.values.min()) < 0:
        step = int(rates.steps[rates.values < 0][0])
        return _found(where, f"the learning rate is below zero from step {step} on: the loss is climbed", step, rates, "critical")
    again = rates.rises_again()
    if again is not None and rates.waves() <= WAVES:
        text = f"the learning rate comes down until step {again[0]}, turns round and rises to {number(again[2])}: not clamped at its end"
        return _found(where, text, again[0], rates)
    first, idle, before = rates.tail_below(NOTHING)
    if idle >= max(2 * FEW, IDLE * rates.span) and (rates.at(first) == 0 or rates.at(first) > SUDDEN * before):
        text = f"the learning rate is {number(rates.at(first))} or less from step {first} on, {number(idle)} of {number(rates.span)} steps"
        return _found(where, text, first, rates)
    if rates.span >= MANY and rates.straight_rise() and _small_updates(chart, rates):
        text = f"the learning rate still rises at the last step, to {number(rates.peak)}: the warm-up is longer than the run"
        return _found(where, text, 0, rates)
    return None


def _small_updates(chart: Chart, rates: Rates) -> bool:
    """True if in the run's second half, or when last looked at, the updates were smaller than healthy ones at a full rate.

    Those seen only before it are taken as large as the rate makes them at its end.
    """
    seen = chart["update_ratio"]
    moved = [reading.value for reading in seen if reading.step >= rates.steps[len(rates.steps) // 2]]
    last = max((reading.step for reading in seen if rates.at(reading.step) > 0), default=None)
    if not moved and last is not None:
        moved = [reading.value * rates.peak / rates.at(last) for reading in seen if reading.step == last]
    return bool(moved) and sorted(moved)[len(moved) // 2] < ORDINARY


def _found(cause: Reading, text: str, step: int, rates: Rates, severity: Severity = "warning") -> Diagnosis:
    last = Reading(int(rates.steps[-1]), "learning_rate", float(rates.values[-1]), source=cause.source)
    evidence = (Evidence(last, rates.peak, "last learning_rate"), *((Evidence(cause),) if cause.signal != "learning_rate" else ()))
    source = cause.note.get("called") or cause.source if "per epoch" in text else cause.source
    return Diagnosis(
        summary=text + ".",
        evidence=evidence,
        severity=severity,
        step=step,
        where=cause.where,
        source=source,
        certainty="confirmed" if cause.where else "likely",
        # Steps uphill, and a rate that comes back when nothing expects it, throw the run back.
        explains=("exploding-gradients", "learning-rate-too-high", "loss-spike") if "below zero" in text or "rises" in text else (),
    )


def inject(case: Any) -> Any:
    """The cosine is planned for a third of the run and not clamped: the rate comes down and rises again."""
    import math

    def set_unclamped(sick: Any, optimizer: Any, step: int) -> None:
        length = max(sick.steps // 3, 1)
        rate = 0.5 * sick.learning_rate * (1 + math.cos(math.pi * step / length))
        for group in optimizer.param_groups:
            group["lr"] = rate

    return case.but(set_learning_rate=set_unclamped)


condition = Condition(
    id="schedule-misconfigured",
    symptom="the learning-rate schedule is never stepped, counted in the wrong unit, over too early, or rises again",
    needs=("learning_rate",),
    uses=("scheduler_steps", "backwards_since_step", "update_ratio", "batch_rows"),
    diagnose=diagnose,
    prescribes=("count-schedule-steps", "clamp-schedule"),
    leads_to=("learning-rate-too-low", "loss-plateau", "repetitive-generation", "incoherent-generation"),
    inject=inject,
)
