"""Input embedding and output head are declared to share their weights, and are separate in memory.

Looks like
    Nothing raises. The two drift apart as training goes on; a checkpoint that stores one of them loads into a different model; memory for
    the head, its gradient and its optimizer state is paid twice.

Why
    A load, .to(), a deep copy, a resize or a wrapper replaced one of the two parameters after they were tied, or the weight was copied
    where it should have been assigned.

Tell apart
    Models that do not tie have two different tensors by declaration. Here a configuration says they are tied, or the two hold equal
    values in separate memory.

Cure
    Assign again after loading and before building the optimizer: head.weight = embedding.weight (tie_weights() in transformers).

Sources
    Press & Wolf 2017, arXiv 1608.05859; Inan et al. 2017, arXiv 1611.01462; lingua issue 75, torchtune issue 616, NeMo Automodel issues
    2213 and 2511, verl issue 7835.
"""

from __future__ import annotations

from typing import Any

from sickbay.core.chart import Chart
from sickbay.core.condition import Condition
from sickbay.core.diagnosis import Diagnosis, Evidence


def diagnose(chart: Chart) -> Diagnosis | None:
    """The newest reading of each pair says that it shares no memory."""
    ties = chart["tied_weights"].finite()
    newest = [ties.at(where)[-1] for where in ties.places()]
    apart = [r for r in newest if r.value == 0]
    if not apart:
        return None
    newest_apart = apart[0]
    since = next(r for r in ties.at(newest_apart.where) if r.value == 0)
    pair = " and ".join(str(name) for name in newest_apart.note.get("pair") or ()) or newest_apart.where or "embedding and head"
    declared = f"declared as tied ({newest_apart.note['declared_by']})" if newest_apart.note.get("declared_by") else "meant to be tied"
    values = "equal values, in" if newest_apart.note.get("equal_values") else "different values, in"
    return Diagnosis(
        summary=f"{pair} are {declared} and hold {values} separate memory: each learns for itself.",
        evidence=(Evidence(newest_apart, 1.0),),
        severity="warning",
        step=since.step,
        where=newest_apart.where,
        source=newest_apart.source,
        seconds=since.seconds,
    )


def inject(case: Any) -> Any:
    """The head gets a copy of the embedding's weight where it should get the weight itself."""
    import dataclasses

    build = case.build

    def build_copied(case: Any) -> Any:
        import torch

        model = build(case)
        model.head.weight = torch.nn.Parameter(model.token_embedding.weight.detach().clone())
        return model

    return case.but(config=dataclasses.replace(case.config, tied_embeddings=True), build=build_copied)


condition = Condition(
    id="untied-embeddings",
    symptom="embedding and head are declared as tied and do not share memory",
    needs=("tied_weights",),
    diagnose=diagnose,
    prescribes=("tie-weights",),
    leads_to=("repetitive-generation", "incoherent-generation"),
    inject=inject,
)
