"""A token id is negative or not smaller than the number of rows of the embedding it looks up.

Looks like
    "index out of range in self" on the CPU; on a GPU a device-side assert that is reported far from its cause, often many
    operations later and with every following CUDA call failing too.

Why
    The tokenizer knows more tokens than the model has rows: tokens were added without resizing the embedding, the tokenizer belongs to
    another model, an ignore value such as -100 got into the inputs, or the ids are shifted by one. Positions beyond the learned
    position table fail the same way.

Tell apart
    shape-mismatch is about the number of dimensions or their sizes; here the shapes are right and one value is not.

Cure
    Give the embedding at least as many rows as the largest id plus one, or mend the tokenizer or the padding value. Check on the host,
    before the lookup: `assert 0 <= ids.min() and ids.max() < embedding.num_embeddings`.

Sources
    PyTorch documentation, `torch.nn.Embedding` (ids in [0, num_embeddings)); RWKV-LM issue 346, torchtitan pull request 1495,
    Yi issue 448, llama3 issue 310.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from sickbay.core.chart import Chart
from sickbay.core.condition import Condition
from sickbay.core.diagnosis import Diagnosis, Evidence


def diagnose(chart: Chart) -> Diagnosis | None:
    """The first uncaught exception whose cause is a token id; None if there was none."""
    error = next((r for r in chart["exception"] if r.note.get("kind") == "token-id"), None)
    if error is None:
        return None
    note = error.note
    first_line = next(iter(str(note.get("message") or note.get("type") or "").splitlines()), "")
    detail = str(note.get("likely") or first_line).rstrip(".")
    return Diagnosis(
        summary=f"A lookup got an id that its table does not have: {detail}.",
        evidence=(Evidence(error, label=str(note.get("type") or "exception")),),
        severity="critical",
        step=error.step,
        where=error.where,
        source=error.source,
        seconds=error.seconds,
    )


def inject(case: Any) -> Any:
    """One id of every batch is the vocabulary's size: one more than the last row."""
    batches = case.batches

    def batches_with_unknown_id(case: Any, split: str) -> Iterator[tuple[Any, Any]]:
        for ids, targets in batches(case, split):
            ids = ids.clone()
            ids[0, 0] = case.config.vocab_size
            yield ids, targets

    return case.but(batches=batches_with_unknown_id)


condition = Condition(
    id="token-id-out-of-range",
    symptom="a token id has no row in the embedding",
    needs=("exception",),
    diagnose=diagnose,
    prescribes=("grow-embedding",),
    inject=inject,
)
