"""Asking one condition, or the nan chapter, about a chart; series and per-tensor readings in a line."""

from __future__ import annotations

from collections.abc import Sequence

from sickbay.core.chart import Chart, Reading
from sickbay.core.condition import checkup
from sickbay.core.diagnosis import Diagnosis, NotExamined
from sickbay.registry import conditions

NAN_CHAPTER = [condition for condition in conditions().values() if condition.chapter == "nan"]


def verdict(condition: str, readings: Chart) -> Diagnosis | NotExamined | None:
    """What `condition` says of `readings`, seeing only what it declared."""
    chosen = conditions()[condition]
    return chosen.diagnose(readings.only((*chosen.needs, *chosen.uses)))


def finding(condition: str, readings: Chart) -> Diagnosis:
    """The diagnosis of `condition`; fails where it finds nothing."""
    answer = verdict(condition, readings)
    assert isinstance(answer, Diagnosis), answer
    return answer


def alarms(readings: Chart) -> list[str]:
    """The ids of the nan chapter's root findings but for notes; fails where a rule broke."""
    result = checkup(readings, NAN_CHAPTER)
    broken = [reason for reason in result.unexamined.values() if "its rule failed" in reason]
    assert not broken, broken
    return [diagnosis.condition for diagnosis in result.diagnoses if diagnosis.severity != "note"]


def tensors(signal: str, rows: dict[str, Sequence[float]]) -> list[Reading]:
    """Readings of `signal` from step 0 on, by place."""
    return [Reading(step, signal, value, where) for where, values in rows.items() for step, value in enumerate(values)]


def wobble(count: int, level: float = 3.0, spread: float = 0.05) -> list[float]:
    """A noisy level without a random generator: the noise takes eleven values in a fixed order."""
    return [level + spread * ((7 * index % 11) - 5) / 5 for index in range(count)]
