"""Asking one condition about a made-up chart."""

from __future__ import annotations

from typing import Any

from sickbay import registry
from sickbay.core.chart import Chart, Reading
from sickbay.core.condition import checkup
from sickbay.core.diagnosis import Diagnosis, NotExamined


def read(signal: str, value: float, step: int = 0, where: str = "", source: str = "train.py:7", **note: Any) -> Reading:
    return Reading(step, signal, value, where, note, source)


def ask(id_: str, record: Chart) -> Diagnosis | NotExamined | None:
    """The verdict of one condition, through `checkup`, which also refuses undeclared signals and failing rules."""
    result = checkup(record, [registry.conditions()[id_]])
    if result.diagnoses:
        return result.diagnoses[0]
    return NotExamined(result.unexamined[id_]) if result.unexamined else None


def found(id_: str, record: Chart, severity: str) -> Diagnosis:
    verdict = ask(id_, record)
    assert isinstance(verdict, Diagnosis), verdict
    assert verdict.severity == severity
    assert verdict.prescribes in registry.treatments()
    assert verdict.summary.endswith(".")
    return verdict


def unexamined(id_: str, record: Chart) -> str:
    verdict = ask(id_, record)
    assert isinstance(verdict, NotExamined), verdict
    assert not verdict.reason.startswith("its rule failed"), verdict.reason
    return verdict.reason
