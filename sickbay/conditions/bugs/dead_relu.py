"""Half or more of a layer's ReLU units give zero for every input, so they have no gradient and cannot recover.

Looks like
    The loss stops early; activations of the layer are mostly exact zeros; the gradient of the weights that feed it is zero in whole rows.

Why
    A step that was too large, a large negative bias or unscaled inputs pushed the units' inputs below zero for all data. From there the
    gradient is exactly zero.

Tell apart
    A unit that is zero for most inputs is sparse, not dead; only units that were zero for every input of all batches looked at count.
    GELU and SiLU units do not die. learning-rate-too-high and unscaled inputs are causes: where they are found too, mend them first.

Cure
    Lower the learning rate or warm up, initialise for ReLU (He), normalise the inputs, or use GELU or a leaky ReLU.

Sources
    guide, "Implementation Bugs: Gradient Not Flowing" (dead ReLU); Lu et al. 2019, "Dying ReLU and Initialization", arXiv 1903.06733; He et
    al. 2015, arXiv 1502.01852.
"""

from __future__ import annotations

from typing import Any

from sickbay.core.chart import Chart, Reading
from sickbay.core.condition import Condition
from sickbay.core.diagnosis import Diagnosis, Evidence, NotExamined, Threshold

LIMIT = Threshold(0.5, "share of units", source="Amazon SageMaker Debugger, DeadRelu rule: threshold_layer 50 %")
NEARLY_ALL = Threshold(
    0.9, "share of units", source="symmetric initialisation leaves about half of all units active; nine in ten silent are no chance"
)
EXAMS = Threshold(3, "batches", source="a unit that is zero in one batch may be sparse; three batches in a row make it unlikely")


def diagnose(chart: Chart) -> Diagnosis | NotExamined | None:
    """Layers of which half the units stayed at zero in the last three batches looked at, or nearly all units in fewer."""
    seen = chart["dead_units"].finite()
    recent = {where: list(seen.at(where))[-int(EXAMS) :] for where in seen.places()}
    judged = {where: readings for where, readings in recent.items() if len(readings) >= EXAMS or _share(readings) >= NEARLY_ALL}
    if not judged:
        return NotExamined(f"no ReLU layer was looked at in {EXAMS:.0f} batches")
    dead = {where: readings for where, readings in judged.items() if _share(readings) >= LIMIT}
    if not dead:
        return None
    where = max(dead, key=lambda place: (_share(dead[place]), len(dead[place])))
    share, batches, least = _share(dead[where]), len(dead[where]), min(dead[where], key=lambda r: r.value)
    since = next(r for r in seen.at(where) if r.value >= LIMIT)
    units = f" of {float(least.note['units']):.0f}" if least.note.get("units") else ""
    return Diagnosis(
        summary=f"{share:.0%}{units} ReLU units in {where or 'a layer'} gave zero for every input of the last {batches} "
        f"batch{'es' if batches > 1 else ''} looked at ({len(dead)} of {len(recent)} layers are like it): they have no gradient left.",
        evidence=(Evidence(least, LIMIT),),
        severity="warning",
        certainty="confirmed" if batches >= EXAMS else "likely",
        step=since.step,
        where=where,
        source=least.source,
        seconds=since.seconds,
    )


def _share(readings: list[Reading]) -> float:
    """The share dead in every one of `readings`, as far as they tell: never above the least of them."""
    so_far = readings[-1].note.get("all_dead_so_far")
    least = min(r.value for r in readings)
    return least if so_far is None else min(least, float(so_far))


def inject(case: Any) -> Any:
    """The feed-forward blocks use ReLU behind a bias so negative that no input gets past it."""
    import dataclasses

    build = case.build

    def build_dead(case: Any) -> Any:
        import torch

        model = build(case)
        for block in model.blocks:
            up = torch.nn.Linear(case.config.dim, case.config.hidden_dim)
            up.weight = block.feed_forward.up.weight
            torch.nn.init.constant_(up.bias, -10.0)
            block.feed_forward.up = up
        return model

    return case.but(config=dataclasses.replace(case.config, activation="relu"), build=build_dead)


condition = Condition(
    id="dead-relu",
    symptom="half or more of a layer's ReLU units are zero for every input",
    needs=("dead_units",),
    diagnose=diagnose,
    prescribes=("revive-relu",),
    leads_to=(
        "loss-plateau",
        "vanishing-gradients",
    ),
    inject=inject,
)
