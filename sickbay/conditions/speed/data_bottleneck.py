"""A large part of every step is spent waiting for its batch.

Looks like
    The GPU or the processor's other cores idle between steps; time per step does not change with the size of the model.

Why
    Batches are made in the training process, one after the other with the steps: tokenising, decoding or string handling on the fly with
    num_workers=0, rows built in Python loops, slow storage; or workers that cannot keep up.

Tell apart
    The first steps, where workers start, and an epoch's beginning do not count; nor do evaluations and checkpoints between steps. In a tiny
    model on toy data everything is overhead: the wait must also be long in itself, and a row must cost
    more than being stacked with others.

Cure
    Prepare the data once (token ids in a memory-mapped file), DataLoader workers with prefetch and persistent_workers, array operations
    instead of loops over rows.

Sources
    Mohan et al. 2021, "Analyzing and Mitigating Data Stalls in DNN Training", VLDB 14(5); PyTorch documentation, `torch.utils.data`
    (multi-process data loading).
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping
from typing import Any

from sickbay.core.chart import Chart, Reading
from sickbay.core.condition import Condition
from sickbay.core.diagnosis import Diagnosis, Evidence, NotExamined, Threshold

SHARE = Threshold(
    0.2, "share of step time", source="a fifth of the run is paid for waiting; Mohan et al. 2021 find 10-70 % in sick pipelines"
)
STEPS = Threshold(10, "steps", source="the median of fewer steps still holds the start of the pipeline")
LONG = Threshold(0.003, "seconds", source="calibration: a healthy loader's collating of a small batch takes up to 2 ms on a busy machine")
ROW = Threshold(6e-5, "seconds of computing a row", source="calibration: indexing tensors and stacking them takes 5 to 20 µs a row")
MOSTLY_IDLE = Threshold(0.5, "share of the wait", source="more waiting than computing: it decides the words, not the verdict")


def diagnose(chart: Chart) -> Diagnosis | NotExamined | None:
    """The wait's share over the steady steps, where the wait is also long in itself."""
    reading = list(chart["data_wait"])[-1]
    if reading.note["steps"] < STEPS:
        return NotExamined(f"{reading.note['steps']} steps were timed after the start; this needs {STEPS:.0f}")
    if reading.value < SHARE or reading.note["seconds"] < LONG or _only_collates(reading.note):
        return None
    wait, step = reading.note["seconds"] * 1e3, reading.note["step_seconds"] * 1e3
    text = f"{reading.value:.0%} of each step ({wait:.1f} of {step:.1f} ms) goes into its batch: {_how(reading)}."
    return Diagnosis(text, (Evidence(reading, SHARE),), "warning", reading.step, reading.where, reading.source, seconds=reading.seconds)


def _only_collates(note: Mapping[str, Any]) -> bool:
    """True where the loader does little more than stack finished rows: a tiny model, not a slow loader, makes that a large share."""
    return bool(note.get("rows")) and not note["workers"] and note["idle"] < MOSTLY_IDLE and note["seconds"] < ROW * note["rows"]


def _how(reading: Reading) -> str:
    """Who makes the batch, and whether it computes or waits."""
    note = reading.note
    waits = note["idle"] >= MOSTLY_IDLE
    if not note["loader"]:
        return "the line waits (sleep, storage, network)" if waits else "it is computed between the steps, in the training process"
    name = f"the DataLoader over {note['dataset']}"
    if note["workers"]:
        return f"{name} has {note['workers']} workers that do not keep up"
    return f"{name} has num_workers=0 and {'waits' if waits else 'computes'} in the training process"


def inject(case: Any) -> Any:
    """Each batch comes from slow storage."""
    batches = case.batches

    def slow(case: Any, split: str) -> Iterator[tuple[Any, Any]]:
        for batch in batches(case, split):
            time.sleep(0.03)
            yield batch

    return case.but(batches=slow)


condition = Condition(
    id="data-bottleneck",
    symptom="each step waits for its batch",
    needs=("data_wait",),
    diagnose=diagnose,
    prescribes=("prepare-data-ahead",),
    inject=inject,
)
