"""report.html: one file that needs no network and no JavaScript to be read; the charts come alive with it."""

from __future__ import annotations

import base64
import functools
import hashlib
import json
import shlex
from collections.abc import Sequence
from importlib import resources
from typing import Any

import jinja2
from markupsafe import Markup

from sickbay import registry
from sickbay.core.chart import Chart
from sickbay.core.condition import CHAPTERS
from sickbay.core.diagnosis import Checkup, Diagnosis, Evidence, number
from sickbay.core.signals import SIGNALS
from sickbay.report import curves, heatmap, record
from sickbay.report.colours import theme_css
from sickbay.report.prose import blocks
from sickbay.report.words import (
    CHAPTER_TITLES,
    by_reason,
    duration,
    ended,
    one_line,
    problem_texts,
    recording_stopped,
    shorten,
    verdict_line,
)

SAFETY = {"safe": "same mathematics", "changes-training": "changes the training's numbers from here on", "advice": "needs your hand"}
LONGEST_PATH = 240
MAPPED = ("param_grad_norm", "update_ratio")


def page(chart: Chart, checkup: Checkup) -> str:
    """The whole page as text.

    Everything the run supplied is escaped; scripts and styles run by their hash alone (Content-Security-Policy),
    so that even a string which slipped through could not act.
    """
    marks = _marks(checkup.diagnoses)
    charts = curves.all_curves(chart)
    maps = [heatmap.drawing(grid, marks) for signal in MAPPED if (grid := heatmap.grid(chart, signal))]
    data = {
        "charts": [{"id": c.id, "steps": c.steps, "log": c.log, "lost": c.lost, "lines": [vars(line) for line in c.lines]} for c in charts],
        "maps": [m.data for m in maps],
        "marks": marks,
    }
    style = _style()
    script = _vendored("uPlot.iife.min.js") + "\n" + _template_text("page.js")
    return (
        _environment()
        .get_template("page.html")
        .render(
            csp=_policy(style, script),
            style=Markup(style),
            script=Markup(script),
            data=Markup(_embeddable(data)),
            title=one_line(chart.facts.get("script") or "a run"),
            command=_command(chart),
            verdict=checkup.verdict,
            verdict_line=verdict_line(checkup),
            facts=_facts(chart),
            findings=[_finding(rank, diagnosis) for rank, diagnosis in enumerate(checkup.diagnoses, 1)],
            charts=charts,
            maps=maps,
            healthy=_by_chapter(checkup.healthy),
            num_healthy=len(checkup.healthy),
            unexamined=[(one_line(reason), ids) for reason, ids in by_reason(checkup.unexamined)],
            num_unexamined=len(checkup.unexamined),
            treatments=[
                {key: one_line(value) for key, value in t.items()} for t in chart.facts.get("treatments") or [] if isinstance(t, dict)
            ],
            exception=_exception(chart),
            recording=recording_stopped(chart.facts),
            problems=problem_texts(chart.facts),
            version=record.version(),
        )
    )


def _finding(rank: int, diagnosis: Diagnosis) -> dict[str, Any]:
    treatment = registry.treatment_for(diagnosis)
    condition = registry.conditions().get(diagnosis.condition)
    return {
        "rank": rank,
        "id": diagnosis.condition,
        "chapter": CHAPTER_TITLES.get(condition.chapter, "") if condition else "",
        "severity": diagnosis.severity,
        "certainty": diagnosis.certainty,
        "step": f"{diagnosis.step:,}",
        "seconds": duration(diagnosis.seconds) if diagnosis.seconds else "",
        "where": _path(diagnosis.where),
        "source": _path(diagnosis.source),
        "summary": one_line(diagnosis.summary),
        "evidence": [_evidence(evidence) for evidence in diagnosis.evidence],
        "explains": diagnosis.explains,
        "treatment": treatment,
        "safety": SAFETY.get(treatment.safety, "") if treatment else "",
        "doc": blocks(condition.doc) if condition else [],
    }


def _evidence(evidence: Evidence) -> dict[str, Any]:
    reading = evidence.reading
    return {
        "label": one_line(evidence.label or reading.signal),
        "meaning": SIGNALS[reading.signal].meaning.split(";")[0],
        "value": number(reading.value),
        "limit": "" if evidence.limit is None else number(evidence.limit),
        "limit_source": one_line(getattr(evidence.limit, "source", "")),
        "unit": getattr(evidence.limit, "unit", "") or evidence.unit,
        "step": f"{reading.step:,}",
        "where": _path(reading.where),
        "source": _path(reading.source),
    }


def _facts(chart: Chart) -> list[tuple[str, str]]:
    run = record.run(chart)
    share = run["overhead"].get("share_of_step_time")
    seconds = run["seconds"]
    rows = [
        ("ended", ended(chart.facts)),
        ("optimizer steps", f"{run['steps']:,}"),
        ("time", duration(float(seconds)) if isinstance(seconds, (int, float)) else ""),
        ("device", run["device"]),
        ("torch", run["torch"]),
        ("processes", run["world_size"] if run["world_size"] != 1 else ""),
        ("cost of watching", f"{share:.1%} of step time" if isinstance(share, (int, float)) else ""),
        ("started", run["started"]),
    ]
    return [(name, one_line(value)) for name, value in rows if value not in (None, "")]


def _command(chart: Chart) -> str:
    script = chart.facts.get("script")
    return one_line(f"{script} {shlex.join(map(str, chart.facts.get('argv') or []))}") if script else ""


def _exception(chart: Chart) -> dict[str, str]:
    readings = chart["exception"]
    if not len(readings):
        return {}
    last = readings[-1]
    return {
        "type": one_line(last.note.get("type", "exception")),
        "message": one_line(last.note.get("message", "")),
        "source": one_line(last.source),
        "where": one_line(last.where),
    }


def _marks(diagnoses: Sequence[Diagnosis]) -> list[tuple[int, str, str]]:
    return [(diagnosis.step, f"{rank} {diagnosis.condition}", diagnosis.severity) for rank, diagnosis in enumerate(diagnoses, 1)]


def _by_chapter(ids: Sequence[str]) -> list[tuple[str, list[str]]]:
    chapters = {chapter: [id_ for id_ in ids if record.chapter_of(id_) == chapter] for chapter in (*CHAPTERS, "")}
    return [(CHAPTER_TITLES.get(chapter, "Others"), members) for chapter, members in chapters.items() if members]


def _path(value: str) -> str:
    return shorten(one_line(value), LONGEST_PATH)


def _embeddable(data: Any) -> str:
    """JSON that no HTML parser can mistake for a tag and no JavaScript engine for a line end."""
    text = json.dumps(record.jsonable(data), ensure_ascii=False, allow_nan=False, separators=(",", ":"))
    for character in "<>&\u2028\u2029":
        text = text.replace(character, f"\\u{ord(character):04x}")
    return text


def _policy(style: str, script: str) -> str:
    return f"default-src 'none'; style-src '{_hash(style)}'; script-src '{_hash(script)}'; base-uri 'none'; form-action 'none'"


def _hash(text: str) -> str:
    return "sha256-" + base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()


@functools.cache
def _style() -> str:
    return "\n".join((_vendored("uPlot.min.css"), theme_css(), _template_text("page.css")))


@functools.cache
def _vendored(name: str) -> str:
    return resources.files("sickbay.report").joinpath("vendor", name).read_text(encoding="utf-8")


@functools.cache
def _template_text(name: str) -> str:
    return resources.files("sickbay.report").joinpath("templates", name).read_text(encoding="utf-8")


@functools.cache
def _environment() -> jinja2.Environment:
    return jinja2.Environment(
        loader=jinja2.FunctionLoader(_template_text),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
