"""A larger batch would train on many more rows in the same time.

Looks like
    Seconds per step hardly change when the batch is doubled; the processor or GPU is far from its peak.

Why
    Every operation has a fixed cost, and a product of few rows reads all weights for little arithmetic. Up to the knee of the curve
    more rows are nearly free.

Tell apart
    The curve is measured by repeating the script's own rows. Where memory or the wish for more gradient noise sets the batch, nothing is
    wrong: this is advice. A model called once per example in a loop is unbatched-forward.

Cure
    Raise the batch to the knee; keep tokens per update, or rescale the learning rate and the schedule.

Sources
    McCandlish et al. 2018, arXiv 1812.06162 (the largest useful batch); Goyal et al. 2017, arXiv 1706.02677 (linear scaling); Williams et
    al. 2009, "Roofline", CACM 52(4).
"""

from __future__ import annotations

from typing import Any

from sickbay.core.chart import Chart
from sickbay.core.condition import Condition
from sickbay.core.diagnosis import Diagnosis, Evidence, Threshold

GAIN = Threshold(3.0, "ratio", source="a third of the reachable rows a second: batches beside the knee are within a factor of two of it")


def diagnose(chart: Chart) -> Diagnosis | None:
    """A note with the measured curve where the best batch is far above the script's own."""
    reading = chart["throughput_gain"].worst()
    if reading is None or reading.value < GAIN:
        return None
    curve = ", ".join(f"{size}: {speed:,.0f}" for size, speed in reading.note["curve"].items())
    text = f"{reading.note['rows']} rows a call use {1 / reading.value:.0%} of what {reading.note['knee']} rows would: "
    text += f"forward and backward pass on {reading.value:.1f} times as many rows a second (rows: rows/s on one thread: {curve})."
    return Diagnosis(
        text, (Evidence(reading, GAIN),), "note", reading.step, reading.where, reading.source, "likely", seconds=reading.seconds
    )


def inject(case: Any) -> Any:
    """One row of sixteen tokens in each step; not clipped, since so few tokens have large gradients."""
    import dataclasses

    return case.but(batch_size=1, clip=None, config=dataclasses.replace(case.config, context=16))


condition = Condition(
    id="small-batch",
    symptom="the batch is far below the knee of the throughput curve",
    needs=("throughput_gain",),
    diagnose=diagnose,
    prescribes=("larger-batch",),
    inject=inject,
)
