"""Some training batches are much smaller than the loader's batch size, and each counts as one step like any other.

Looks like
    The loss jumps once an epoch, and so does the gradient norm; batch normalisation is noisy there, or raises for a batch of one.

Why
    The data set's size is no multiple of the batch size and `drop_last` is False: the last batch holds the remainder. Its few samples
    weigh as much as a whole batch, and their mean gradient is the noisier the fewer they are.

Tell apart
    loss-spike follows bad samples, not the end of an epoch. Micro-batches of one step are another matter: accumulation-weighting.

Cure
    `DataLoader(..., drop_last=True)` for training; or a batch size that divides the data set.

Sources
    guide, "Quick debugging checklist" (batch sizes are what they should be); Goyal et al. 2017, arXiv 1706.02677, section 2 (gradient
    noise against batch size); PyTorch documentation, `DataLoader` (drop_last).
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from sickbay.core.chart import Chart, Reading
from sickbay.core.condition import Condition
from sickbay.core.diagnosis import Diagnosis, Evidence, Threshold

TINY = Threshold(
    0.25, "share of the batch size", source="a quarter of the samples doubles the gradient's noise (Goyal et al. 2017, section 2)"
)


def diagnose(chart: Chart) -> Diagnosis | None:
    """The smallest batch, if it has at most a quarter of the rows that its loader promised."""
    small = [r for r in chart["batch_rows"] if 0 < r.value <= TINY * _promised(r)]
    if not small:
        return None
    least = min(small, key=lambda reading: (reading.value / _promised(reading), reading.step))
    promised = _promised(least)
    text = (
        f"A training batch has {least.value:.0f} of {promised} rows; {len(small)} such batch{'es were' if len(small) > 1 else ' was'} seen"
    )
    return Diagnosis(
        summary=f"{text}: its samples weigh {promised / least.value:.3g} times as much as others.",
        evidence=(Evidence(least, TINY * promised, label="rows"),),
        severity="note",
        step=least.step,
        where=least.where,
        source=least.source,
        seconds=least.seconds,
    )


def _promised(reading: Reading) -> int:
    return int(reading.note.get("promised") or 0)


def inject(case: Any) -> Any:
    """The batches come from a DataLoader over a set whose last batch has one sample."""
    batches = case.batches

    def batches_of_a_loader(case: Any, split: str) -> Iterator[Any]:
        import torch
        from torch.utils.data import DataLoader, TensorDataset

        source = batches(case, split)
        pairs = [next(source) for _ in range(3)]
        ids, targets = (torch.cat(part)[: 2 * case.batch_size + 1] for part in zip(*pairs, strict=True))
        loader = DataLoader(TensorDataset(ids, targets), case.batch_size, shuffle=True)
        while True:
            yield from loader

    return case.but(batches=batches_of_a_loader)


condition = Condition(
    id="batch-size-mismatch",
    symptom="some training batches are much smaller than the loader's batch size",
    needs=("batch_rows",),
    diagnose=diagnose,
    prescribes=("drop-last",),
    inject=inject,
)
