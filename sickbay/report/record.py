"""The verdict as data: report.json, schema 1, and the facts that an earlier report.json remembers."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Mapping
from importlib import metadata
from pathlib import Path
from typing import Any

from sickbay import registry
from sickbay.core.chart import Chart
from sickbay.core.diagnosis import Checkup, Diagnosis, Evidence
from sickbay.report.words import num_steps

SCHEMA = 1
NOT_MEASURED = {"share_of_step_time": None, "how": "not measured"}


def report(chart: Chart, checkup: Checkup) -> dict[str, Any]:
    """The content of report.json: every key is there, unknown facts are null, and `json.dumps(..., allow_nan=False)` accepts it.

    JSON has no NaN and no infinity: such numbers are the strings "NaN", "Infinity" and "-Infinity",
    which `float()` in Python and `Number()` in JavaScript read back.
    """
    facts = chart.facts
    return {
        "schema": SCHEMA,
        "sickbay": version(),
        "run": run(chart),
        "verdict": checkup.verdict,
        "diagnoses": [_diagnosis(diagnosis) for diagnosis in checkup.diagnoses],
        "healthy": list(checkup.healthy),
        "unexamined": [{"condition": id_, "reason": jsonable(reason)} for id_, reason in checkup.unexamined.items()],
        "treatments": jsonable(facts.get("treatments") or []),
        "problems": jsonable(facts.get("problems") or []),
        "recording": jsonable(facts.get("recording_stopped") or facts.get("recording")) or None,
    }


def run(chart: Chart) -> dict[str, Any]:
    """The `run` block: what was run, for how long and how it ended; null where the record does not say."""
    facts = chart.facts
    return {
        "script": jsonable(facts.get("script")),
        "argv": jsonable(facts.get("argv") or []),
        "started": jsonable(facts.get("started")),
        "seconds": jsonable(facts.get("seconds")),
        "steps": num_steps(chart),
        "exit_code": jsonable(facts.get("exit_code")),
        "signal": jsonable(facts.get("signal")),
        "ended": jsonable(facts.get("ended")),
        "world_size": jsonable(facts.get("world_size", 1)),
        "device": jsonable(facts.get("device")),
        "torch": jsonable(facts.get("torch")),
        "overhead": {**NOT_MEASURED, **jsonable(_mapping(facts.get("overhead")))},
    }


def chapter_of(condition: str) -> str:
    """The chapter that `condition` belongs to; empty for an id that this version does not know."""
    known = registry.conditions().get(condition)
    return known.chapter if known else ""


def to_json(content: Mapping[str, Any]) -> str:
    """`content` as strictly valid, readable JSON ending in a newline."""
    return json.dumps(content, indent=2, ensure_ascii=False, allow_nan=False) + "\n"


def remembered_facts(folder: str | os.PathLike[str]) -> dict[str, Any]:
    """The facts that an earlier report.json in `folder` holds beyond the record (exit code, how it ended ...); empty if there is none."""
    try:
        content = json.loads((Path(folder) / "report.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    if not isinstance(content, dict) or content.get("schema") != SCHEMA:
        return {}
    facts = {key: value for key, value in _mapping(content.get("run")).items() if value is not None}
    facts.update({key: content[key] for key in ("treatments", "problems", "recording") if content.get(key)})
    if _mapping(facts.get("overhead")).get("share_of_step_time") is None:
        facts.pop("overhead", None)
    return facts


def version() -> str:
    """The installed version of sickbay; "unknown" when it runs from a folder that was never installed."""
    try:
        return metadata.version("sickbay")
    except metadata.PackageNotFoundError:
        return "unknown"


def jsonable(value: Any) -> Any:
    """`value` made of nothing but what strict JSON and UTF-8 can hold."""
    if value is None or isinstance(value, bool):
        return value
    if isinstance(value, int):
        return int(value)
    if isinstance(value, float):
        if math.isfinite(value):
            return float(value)
        return "NaN" if value != value else "Infinity" if value > 0 else "-Infinity"
    if isinstance(value, str):
        # A file name that is not UTF-8 reaches Python with lone surrogates, which no encoder accepts.
        return value.encode("utf-8", "backslashreplace").decode("utf-8")
    if isinstance(value, Mapping):
        return {jsonable(str(key)): jsonable(item) for key, item in value.items()}
    if isinstance(value, (list, tuple, set, frozenset)):
        return [jsonable(item) for item in value]
    return jsonable(str(value))


def _diagnosis(diagnosis: Diagnosis) -> dict[str, Any]:
    treatment = registry.treatment_for(diagnosis)
    fix = {"treatment": treatment.id, "safety": treatment.safety, "summary": treatment.summary, "patch": None} if treatment else None
    return {
        "condition": diagnosis.condition,
        "chapter": chapter_of(diagnosis.condition),
        "severity": diagnosis.severity,
        "certainty": diagnosis.certainty,
        "step": diagnosis.step,
        "seconds": jsonable(diagnosis.seconds),
        "where": jsonable(diagnosis.where),
        "source": jsonable(diagnosis.source),
        "summary": jsonable(diagnosis.summary),
        "evidence": [_evidence(evidence) for evidence in diagnosis.evidence],
        "explains": list(diagnosis.explains),
        "fix": fix,
    }


def _evidence(evidence: Evidence) -> dict[str, Any]:
    reading = evidence.reading
    return {
        "signal": reading.signal,
        "label": jsonable(evidence.label),
        "step": reading.step,
        "value": jsonable(reading.value),
        "limit": jsonable(evidence.limit),
        "unit": evidence.unit,
        "where": jsonable(reading.where),
        "source": jsonable(reading.source),
    }


def _mapping(value: Any) -> Mapping[str, Any]:
    return value if isinstance(value, Mapping) else {}
