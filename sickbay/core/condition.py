"""A condition: one thing that can be wrong, as a value that reads a chart; and `checkup`, which asks all of them."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from sickbay.core.chart import Chart
from sickbay.core.diagnosis import Checkup, Diagnosis, NotExamined

HEADINGS = ("Looks like", "Why", "Tell apart", "Cure", "Sources")
CHAPTERS = ("nan", "convergence", "memory", "speed", "generation", "bugs")

_SEVERITY_RANK = {"critical": 0, "warning": 1, "note": 2}
_CERTAINTY_RANK = {"confirmed": 0, "likely": 1, "suspected": 2}


@dataclass(frozen=True)
class Condition:
    """One fault and how it is recognised.

    `needs`: signals without which nothing can be said; `uses`: signals read when they are there.
    `prescribes`: treatment ids, best first. `leads_to`: conditions this one causes (a DAG over the catalogue).
    `presumes_health`: its notes are made of runs without an alarm alone, since what is wrong there may be all that they see.
    `inject(case) -> case` plants the fault in the reference. `chapter` and `doc` are set by the registry.
    """

    id: str
    symptom: str
    needs: tuple[str, ...]
    diagnose: Callable[[Chart], Diagnosis | NotExamined | None]
    prescribes: tuple[str, ...]
    uses: tuple[str, ...] = ()
    leads_to: tuple[str, ...] = ()
    after_step: int = 0
    presumes_health: bool = False
    inject: Callable[[Any], Any] | None = None
    chapter: str = ""
    doc: str = ""


def checkup(chart: Chart, conditions: Iterable[Condition]) -> Checkup:
    """Every condition's verdict over `chart`, root causes first, consequences folded beneath them."""
    found: dict[str, Diagnosis] = {}
    healthy: list[str] = []
    unexamined: dict[str, str] = {}
    by_id = {condition.id: condition for condition in conditions}
    for condition in by_id.values():
        verdict = _ask(condition, chart)
        if isinstance(verdict, NotExamined):
            unexamined[condition.id] = verdict.reason
        elif verdict is None:
            healthy.append(condition.id)
        else:
            prescribes = verdict.prescribes or (condition.prescribes[0] if condition.prescribes else "")
            found[condition.id] = dataclasses.replace(verdict, condition=condition.id, prescribes=prescribes)
    roots = _roots_first(found, by_id)
    if roots and roots[0].severity != "note":
        for id_ in [id_ for id_ in found if by_id[id_].presumes_health and found[id_].severity == "note"]:
            del found[id_]
            unexamined[id_] = f"{roots[0].condition} was found, and may be all there is to it"
        roots = _roots_first(found, by_id)
    return Checkup(tuple(roots), tuple(healthy), unexamined)


def _ask(condition: Condition, chart: Chart) -> Diagnosis | NotExamined | None:
    for signal in condition.needs:
        reason = chart.why_unobserved(signal)
        if reason is not None:
            return NotExamined(reason)
    if chart.last_step < condition.after_step:
        return NotExamined(f"the run has {chart.last_step} steps; this needs {condition.after_step}")
    try:
        return condition.diagnose(chart.only((*condition.needs, *condition.uses)))
    except Exception as problem:  # a broken rule must cost its own verdict only
        return NotExamined(f"its rule failed: {type(problem).__name__}: {problem}")


def reachable(start: str, by_id: dict[str, Condition]) -> set[str]:
    """All conditions that `start` can lead to, directly or through others."""
    seen: set[str] = set()
    stack = [start]
    while stack:
        condition = by_id.get(stack.pop())
        for effect in condition.leads_to if condition else ():
            if effect not in seen:
                seen.add(effect)
                stack.append(effect)
    return seen


def _roots_first(found: dict[str, Diagnosis], by_id: dict[str, Condition]) -> Sequence[Diagnosis]:
    effects = {cause: (reachable(cause, by_id) | set(found[cause].explains)) & found.keys() for cause in found}
    # A note never hides an alarm: an explanation must weigh at least as much as what it explains, unless it is certain.
    explained_by: dict[str, str] = {}
    for cause in sorted(found, key=lambda c: _weight(found[c])):
        for effect in effects[cause]:
            outweighs = _SEVERITY_RANK[found[cause].severity] <= _SEVERITY_RANK[found[effect].severity] or found[cause].severity != "note"
            if effect != cause and effect not in explained_by and outweighs and explained_by.get(cause) != effect:
                explained_by[effect] = cause
    roots = []
    for id_, diagnosis in found.items():
        if id_ in explained_by:
            continue
        beneath = tuple(effect for effect in found if effect != id_ and _root_of(effect, explained_by) == id_)
        roots.append(dataclasses.replace(diagnosis, explains=beneath))
    return sorted(roots, key=_weight)


def _root_of(id_: str, explained_by: dict[str, str]) -> str:
    seen = {id_}
    while id_ in explained_by and explained_by[id_] not in seen:
        id_ = explained_by[id_]
        seen.add(id_)
    return id_


def _weight(diagnosis: Diagnosis) -> tuple[int, int, int]:
    return (_SEVERITY_RANK[diagnosis.severity], _CERTAINTY_RANK[diagnosis.certainty], diagnosis.step)
