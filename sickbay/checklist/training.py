"""A few watched training steps: every condition of the catalogue is asked about them, and the checklist's rows are drawn from that."""

from __future__ import annotations

import contextlib
import math
import time
from collections import Counter
from typing import Any

import torch

from sickbay.checklist.calling import Calling, ids_and_targets, rows_of
from sickbay.checklist.result import Finding, Row, Verdict
from sickbay.checklist.target import Target, tensors
from sickbay.core.chart import Chart
from sickbay.core.diagnosis import Checkup, Diagnosis, Threshold, number

RATE = 3e-4  # of the AdamW that stands in where no optimizer was given
# What would be said of the optimizer that stands in, or of a loop that is ours.
OURS = frozenset(
    {
        "learning-rate-too-high", "learning-rate-too-low", "missing-warmup", "schedule-misconfigured", "optimizer-missing-parameters",
        "clipping-saturated", "loss-plateau",
    }
)  # fmt: skip
SHORT = frozenset({"undertrained-model", "model-too-small"})  # what would be said of a training of so few steps, which are ours always
HIGH = Threshold(
    2.0, "nats above ln V", source="logits of variance s^2 add s^2/2: 2 nats are a standard deviation of 2, of a fresh model too sure"
)

# Row -> its conditions, and the signals whose numbers it shows.
TOPICS: dict[str, tuple[tuple[str, ...], tuple[str, ...]]] = {
    "labels": (
        (
            "label-misalignment",
            "padding-in-loss",
            "eos-masked",
            "missing-targets",
            "token-id-out-of-range",
            "squashed-logits",
            "silent-broadcast",
        ),
        ("target_offset", "ignored_targets"),
    ),
    "causality": (("causal-leak", "mask-blocks-past"), ("future_influence", "past_blocked")),
    "padding": (("padding-attended",), ("padding_influence",)),
    "packing": (("packing-contamination",), ("packing_influence",)),
    "batch-mixing": (("batch-mixing",), ("row_influence",)),
    "batches": (("data-repeats", "batch-size-mismatch", "non-finite-input", "unscaled-data"), ("batch_repeat",)),
}


def train(target: Target, calling: Calling, folder: str, seconds: float) -> dict[str, Any]:
    """One step per batch has been trained and recorded in `folder`. Runs inside a copy of the process; what fails is in the record."""
    from sickbay.doctor import watch

    until = time.perf_counter() + seconds
    model = target.model.train()
    optimizer = target.optimizer or torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=RATE)
    steps = 0
    with contextlib.suppress(Exception), watch(model, optimizer, out=folder):
        for batch in target.batches:
            optimizer.zero_grad(set_to_none=True)
            loss = calling(model, batch)
            loss.backward()
            optimizer.step()
            steps += 1
            if time.perf_counter() > until:
                break
    return {"steps": steps}


def verdict(folder: str, own_optimizer: bool) -> tuple[Chart, Checkup]:
    """What the conditions say of the record in `folder`; nothing about its length, nor about an optimizer that the user has not chosen."""
    from sickbay import registry
    from sickbay.core.condition import checkup
    from sickbay.core.reader import load_chart

    chart = load_chart(folder)
    left_out = SHORT if own_optimizer else SHORT | OURS
    asked = [c for c in registry.conditions().values() if c.id not in left_out]
    return chart, checkup(chart, asked)


def finding_of(diagnosis: Diagnosis) -> Finding:
    """A condition's diagnosis as a finding."""
    from sickbay import registry

    treatment = registry.treatment_for(diagnosis)
    evidence = diagnosis.evidence[0] if diagnosis.evidence else None
    return Finding(
        diagnosis.condition,
        diagnosis.summary,
        diagnosis.severity,
        diagnosis.where,
        diagnosis.source,
        evidence.reading.value if evidence else None,
        evidence.limit if evidence else None,
        evidence.unit if evidence else "",
        treatment.summary if treatment else "",
        diagnosis.certainty,
        diagnosis.explains,
    )


def topic_row(name: str, chart: Chart, checkup: Checkup) -> Row:
    """The row of one topic: found if one of its conditions is, ok if one of them could be judged."""
    conditions, signals = TOPICS[name]
    found = tuple(id_ for diagnosis in checkup.diagnoses for id_ in (diagnosis.condition, *diagnosis.explains) if id_ in conditions)
    healthy = [id_ for id_ in conditions if id_ in checkup.healthy]
    numbers = {signal: chart[signal].values[-1] for signal in signals if len(chart[signal].finite())}
    reasons = [checkup.unexamined[id_] for id_ in conditions if id_ in checkup.unexamined]
    told = "; ".join(f"{signal.replace('_', ' ')} {number(value)}" for signal, value in numbers.items())
    if found:
        return Row(name, "found", told, found, numbers)
    if healthy and (numbers or not reasons):
        return Row(name, "ok", told or f"{', '.join(healthy)} not found", data=numbers)
    return Row(name, "not examined", reasons[0] if reasons else "no condition of this kind is known")


def batches_row(target: Target, chart: Chart, checkup: Checkup) -> Row:
    """Sizes of the batches, and what the conditions say of them."""
    sizes = Counter(rows_of(batch) for batch in target.batches)
    shapes = Counter(tuple(next(tensors(batch)).shape) for batch in target.batches)
    told = f"{len(target.batches)} batches of " + ", ".join(
        f"{count} x {shape}" if len(shapes) > 1 else f"{shape}" for shape, count in shapes.most_common(3)
    )
    row = topic_row("batches", chart, checkup)
    verdict_: Verdict = "found" if row.verdict == "found" else "ok"
    return Row("batches", verdict_, told, row.conditions, {"sizes": {str(k): v for k, v in sizes.items()}, **row.data})


def start_row(target: Target, chart: Chart, checkup: Checkup, loss: float) -> tuple[Row, list[Finding]]:
    """The first loss against ln V, what a guess among all classes costs."""
    chance = chart["chance_loss"].finite().values
    limit = chance[0] if chance else _classes(target)
    if limit is None or not math.isfinite(loss):
        return Row(
            "initial-loss", "not examined", "no classification loss was seen" if math.isfinite(loss) else "the loss is not finite"
        ), []
    text = f"{number(loss)} nats; ln {round(math.exp(limit)):,} classes is {number(limit)}"
    data = {"loss": loss, "chance": limit}
    known = [id_ for d in checkup.diagnoses for id_ in (d.condition, *d.explains) if id_ == "poor-initialization"]
    if known or (loss > limit + HIGH and "poor-initialization" not in checkup.healthy):
        summary = f"The first loss is {number(loss)} nats; guessing among {round(math.exp(limit)):,} classes costs {number(limit)}."
        cure = "smaller initial weights of the head and of the embedding tied to it: N(0, 0.02)"
        finding = Finding("poor-initialization", summary, "warning", "", "", loss, limit + HIGH, "nats", cure)
        return Row("initial-loss", "found", text, ("poor-initialization",), data), [] if known else [finding]
    return Row("initial-loss", "ok", text, data=data), []


def _classes(target: Target) -> float | None:
    """ln of the embedding's rows, where the batch is one of token ids and targets."""
    if ids_and_targets(target.batches[0]) is None:
        return None
    rows = [module.num_embeddings for module in target.model.modules() if isinstance(module, torch.nn.Embedding)]
    return math.log(rows[0]) if rows else None


def training_row(chart: Chart, checkup: Checkup, seconds: float) -> Row:
    """The steps themselves, and how many conditions could be asked."""
    losses = chart["loss"].finite().values
    named = {id_ for conditions, _ in TOPICS.values() for id_ in conditions}
    found = tuple(d.condition for d in checkup.diagnoses if d.condition not in named)
    went = f", loss {number(losses[0])} to {number(losses[-1])}" if losses else ""
    text = f"{chart.last_step} watched steps{went}; {len(checkup.healthy)} conditions healthy, {len(checkup.unexamined)} not examined"
    if not losses and not found:
        return Row("training", "not examined", "no step could be watched", data={"losses": losses}, seconds=seconds)
    return Row("training", "found" if found else "ok", text, found, {"losses": losses}, seconds)
