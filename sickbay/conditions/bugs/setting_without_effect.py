"""A setting of the model does nothing: with another value the model computes the same, bit for bit.

Looks like
    Nothing at all. A search over the number of heads finds them all equally good, dropout never helps or harms, rotary positions switched
    on give the results of the run without them.

Why
    The value is stored in the configuration and never read where the model is built or called: another name was used, a constant stands
    there, or the training path is another implementation than the one that reads it.

Tell apart
    Settings that act elsewhere (learning rate, seeds, paths), only together with another one, or only in generation are not faults and
    are not tried. A setting that is switched off is not asked for.

Cure
    Read the setting where the part is made or called; or remove it, so that nobody trusts it.

Sources
    rf-detr issue 1410 (a compile flag without effect), Protenix pull request 258 (a precision that was never switched on);
    Sculley et al. 2015, "Hidden Technical Debt in Machine Learning Systems", section 6 (configuration debt).
"""

from __future__ import annotations

from typing import Any

from sickbay.core.chart import Chart
from sickbay.core.condition import Condition
from sickbay.core.diagnosis import Diagnosis, Evidence, Threshold

NOTHING = Threshold(0, "share of trials", source="a fresh model from the same seed is the same to the last bit if the setting is not read")


def diagnose(chart: Chart) -> Diagnosis | None:
    """The settings that were changed, in a fresh model of the same seed, without changing a shape, an output or the loss."""
    without = [r for r in chart["setting_effect"] if r.value <= NOTHING]
    if not without:
        return None
    first = without[0]
    names = list(dict.fromkeys(r.where for r in without))
    text = f"{', '.join(names)} {'has' if len(names) == 1 else 'have'} no effect"
    return Diagnosis(
        summary=f"{text}: {first.where} {first.note.get('was')} changed to {first.note.get('tried')} gives the same bits.",
        evidence=(Evidence(first, NOTHING, label="trials with another result"),),
        severity="warning",
        step=first.step,
        where=first.where,
        source=first.source,
        seconds=first.seconds,
    )


def inject(case: Any) -> Any:
    """The configuration asks for dropout, and the model is built without any."""
    import dataclasses

    build = case.build

    def build_without_dropout(sick: Any) -> Any:
        healthy: Any = type(build(sick))

        class WithoutDropout(healthy):  # type: ignore[misc]
            def __init__(self, config: Any) -> None:
                super().__init__(dataclasses.replace(config, dropout=0.0))
                self.config = config

        return WithoutDropout(sick.config)

    return case.but(config=dataclasses.replace(case.config, dropout=0.1), build=build_without_dropout)


condition = Condition(
    id="setting-without-effect",
    symptom="a setting of the model changes nothing: it is never read",
    needs=("setting_effect",),
    diagnose=diagnose,
    prescribes=("wire-setting",),
    inject=inject,
)
