"""The batch itself holds NaN or infinity before the model has touched it.

Looks like
The loss is NaN at one batch, then at every batch, because the weights took the NaN over. Another seed or another order
of the data moves the step at which it happens.

Why
A missing value read as NaN, a logarithm or a division in preprocessing, a corrupt file, a normalisation by the standard
deviation of a constant column. One bad number in one sample is enough: it reaches every gradient through the loss.

Tell apart
non-finite-weights: the input is clean, a weight is not.
division-by-zero, log-of-zero: the input is clean and the model or the loss makes the NaN.

Cure
Repair or drop the sample, and check at the door: `assert torch.isfinite(x).all()` in the data set, not in the loop.
Until then, skip updates whose gradients are not finite.

Sources
IEEE 754-2019, section 6.2: an operation on NaN gives NaN.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from sickbay.core.chart import Chart
from sickbay.core.condition import Condition
from sickbay.core.diagnosis import Diagnosis, Evidence, number
from sickbay.core.nonfinite import UPDATE, Operand, Origin, origins


def diagnose(chart: Chart) -> Diagnosis | None:
    met = origins(chart["first_nonfinite"])
    for origin in met:
        target = _bad_target(origin)
        if (target or (origin.phase == "input" and not _is_mask(origin))) and not _was_made_before(origin, met):
            reading, sample = origin.reading, origin.reading.note.get("sample")
            given = target or origin.first
            which = f"sample {sample} of the batch" if sample is not None else "the batch"
            name = f" in {given.name!r}" if given.name else ""
            count = number(max(reading.value, given.nonfinite))
            return Diagnosis(
                summary=f"{count} NaN or infinite values{name}: {which} of step {reading.step}",
                evidence=(Evidence(reading, 0.0),),
                severity="critical",
                step=reading.step,
                where=reading.where,
                source=reading.source,
            )
    return _from_outside(met)


def _from_outside(found: Iterable[Origin]) -> Diagnosis | None:
    """A NaN that autograd did not see being made: nobody else can name its origin, where all traces ended so."""
    met = [origin for origin in found if origin.phase not in UPDATE]
    if not met or not all(origin.reading.note.get("ungraded") for origin in met):
        return None
    reading = met[0].reading
    return Diagnosis(
        summary=f"{met[0].op} met a NaN or an infinity that was made without gradient: a target, a weight or a teacher's output of "
        f"step {reading.step}",
        evidence=(Evidence(reading, 0.0),),
        severity="critical",
        step=reading.step,
        where=reading.where,
        source=reading.source,
        certainty="likely",
    )


def _bad_target(origin: Origin) -> Operand | None:
    """The target of a loss function that had it NaN or infinite and all else finite."""
    bad = [operand for operand in origin.operands if operand.nonfinite]
    return bad[0] if origin.forward and len(bad) == 1 and bad[0].name == "target" else None


def _was_made_before(origin: Origin, met: Iterable[Origin]) -> bool:
    """True where an operation of an earlier step made a NaN of finite operands: a state that is carried on brings it back as an input."""
    made = (one for one in met if one.op and not one.reading.note.get("ungraded") and not any(part.nonfinite for part in one.operands))
    return any(one.reading.step < origin.reading.step for one in made)


def _is_mask(origin: Origin) -> bool:
    """True for an additive attention mask: minus infinity where hidden, never anything above 0, never NaN."""
    operands = origin.operands
    return bool(operands) and all("mask" in operand.name and operand.high <= 0 for operand in operands if operand.nonfinite)


def inject(case: Any) -> Any:
    """Rows come as float features, one of them NaN in every fifth batch."""

    def build(sick: Any) -> Any:
        from torch import nn

        class Features(nn.Module):
            """One-hot rows `(B, T, V)` times the embedding matrix instead of a lookup."""

            def __init__(self) -> None:
                super().__init__()
                self.inner = case.build(sick)
                self.inner.token_embedding.forward = lambda ids: self.features_BTV @ self.inner.token_embedding.weight

            def forward(self, features_BTV: Any, documents: Any = None) -> Any:
                self.features_BTV = features_BTV
                return self.inner(features_BTV.nan_to_num().argmax(dim=-1), documents)

        return Features()

    def batches(sick: Any, split: str) -> Any:
        from torch.nn import functional

        for index, (ids, targets) in enumerate(case.batches(sick, split)):
            features_BTV = functional.one_hot(ids, sick.config.vocab_size).float()
            if split == "train" and index % 5 == 4:
                features_BTV[index % len(ids), 3, 0] = float("nan")
            yield features_BTV, targets

    return case.but(build=build, batches=batches)


condition = Condition(
    id="non-finite-input",
    symptom="a batch holds NaN or infinity before the model has touched it",
    needs=("first_nonfinite",),
    diagnose=diagnose,
    prescribes=("drop-bad-samples",),
    leads_to=("non-finite-weights", "scaler-collapse"),
    inject=inject,
)
