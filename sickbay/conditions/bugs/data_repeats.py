"""The same data come again when new data should: one batch every step, batches delivered several times, or one order every epoch.

Looks like
    One batch: training loss goes to zero at once, validation rises. Delivered several times: loss falls in stairs. One order: a wave in
    the loss that repeats with every epoch.

Why
    A random seed set inside the loop or the data set, an iterator made anew each step (next(iter(loader))) without shuffling, every worker
    reading the same stream (an iterable data set that ignores get_worker_info, equal worker seeds), or shuffle=False;
    DistributedSampler.set_epoch not called.

Tell apart
    overfitting on varied data is not this: here the very same batches return. Fitting one batch on purpose, as a test of a model, looks
    the same and is one. Epochs over a small set repeat samples, in new batches.

Cure
    Seed once before the loop, make the iterator once per epoch, shuffle, shard by worker, call sampler.set_epoch(epoch).

Sources
    Bengio 2012, arXiv 1206.5533, section 3 (order of examples); PyTorch documentation, `torch.utils.data` (iterable data sets with
    workers, `DistributedSampler.set_epoch`); pytorch issues 5059 and 31771, Lightning issue 20412.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from typing import Any

from sickbay.core.chart import Chart, Reading, Series
from sickbay.core.condition import Condition
from sickbay.core.diagnosis import Diagnosis, Evidence, NotExamined, Severity, Threshold

SAME = Threshold(0.9, "share of steps", source="a batch that is the one before it in 9 of 10 steps: chance repeats need a set of one batch")
STEPS = Threshold(5, "steps", source="four repeats in a row of a shuffled set of two batches have probability 1/16")
AGAIN = Threshold(0.4, "share of steps", source="two workers with one stream repeat every second batch (0.5), more workers more")
ROUNDS = Threshold(3, "repeats", source="one or two immediate repeats are the seam of two epochs")
PERIOD = Threshold(4, "batches", source="with fewer batches a fixed order is likely by chance: 3! = 6 orders")
PERIODS = Threshold(1.5, "periods", source="one return of the same order is whole; the half more tells it from a run that was resumed")
RETURNS = Threshold(8, "returns", source="eight batches at the same place of a shuffled epoch of four have probability 1/4^8, of more less")


def diagnose(chart: Chart) -> Diagnosis | NotExamined | None:
    """One batch over and over, immediate duplicates, or a constant distance between returns over two whole periods."""
    seen = chart["batch_repeat"].finite()
    if len(seen) < STEPS:
        return NotExamined(f"{len(seen)} batches were fingerprinted; this needs {STEPS:.0f}")
    # Not every step of a long run is looked at: what follows what can be told where two in a row were.
    looked = {r.step for r in seen}
    following = [r for r in seen if r.step - 1 in looked]
    repeats = [r for r in following if r.value == 1 and not r.note.get("same_object")]
    steps = len(following) + 1
    fresh = steps - len(repeats)
    if steps >= STEPS and len(repeats) > SAME * len(following) and fresh <= 2:
        return _found(repeats, SAME, "warning", f"{len(repeats)} of {steps} steps trained on the very batch of the step before.")
    if steps >= STEPS and len(repeats) >= max(AGAIN * len(following), ROUNDS) and fresh >= ROUNDS:
        return _found(repeats, AGAIN, "warning", f"Each batch comes {steps / fresh:.1f} times in a row, as when workers read one stream.")
    return _one_order(seen)


def _one_order(seen: Series) -> Diagnosis | None:
    """A note if batches return at one distance of four or more, or at multiples of it where a return between was not looked at."""
    returned = [r for r in seen if r.value > 0]
    (period, _), *_ = Counter(int(r.value) for r in returned).most_common(1) or [(0, 0)]
    if period < PERIOD:
        return None
    again = [r for r in returned if r.value % period == 0]
    times, span = len(again), again[-1].step - again[0].step + 1
    if times < max(RETURNS, SAME * len(returned)) or span < PERIODS * period:
        return None
    text = f"The same batches return every {period} steps, {times} times running: each epoch has the order of the one before."
    return _found([r for r in returned if r.value == period], PERIOD, "note", text)


def _found(readings: list[Reading], limit: Threshold, severity: Severity, text: str) -> Diagnosis:
    first = readings[0]
    evidence = (Evidence(first, limit if limit is PERIOD else 0.0),)
    return Diagnosis(text, evidence, severity, first.step, first.where, first.source, seconds=first.seconds)


def inject(case: Any) -> Any:
    """The first batch is yielded for ever, as by an iterator made anew each step."""
    batches = case.batches

    def batches_made_anew(case: Any, split: str) -> Iterator[tuple[Any, Any]]:
        while True:
            yield next(iter(batches(case, split)))

    return case.but(batches=batches_made_anew)


condition = Condition(
    id="data-repeats",
    symptom="the same batch every step, batches delivered twice, or the same order every epoch",
    needs=("batch_repeat",),
    diagnose=diagnose,
    prescribes=("shuffle-data",),
    leads_to=("overfitting", "repetitive-generation", "incoherent-generation"),
    inject=inject,
)
