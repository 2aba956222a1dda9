"""The verdict as Markdown, for a comment under a change or a note in a log."""

from __future__ import annotations

import re

from sickbay import registry
from sickbay.core.chart import Chart
from sickbay.core.diagnosis import Checkup, Diagnosis
from sickbay.report.words import by_reason, ended, num_steps, one_line, problem_texts, recording_stopped, verdict_line

_SPECIAL = re.compile(r"([\\`*_{}\[\]()#+!|<>~@&$])")


def markdown(chart: Chart, checkup: Checkup) -> str:
    """The checkup in GitHub's Markdown; whatever the run supplied is shown literally."""
    script = one_line(chart.facts.get("script") or "")
    how = ended(chart.facts)
    lines = [f"## {verdict_line(checkup)}", ""]
    if script:
        lines += [f"{code(script)}, {num_steps(chart):,} optimizer steps" + (f", {literal(how)}" if how else ""), ""]
    for rank, diagnosis in enumerate(checkup.diagnoses, 1):
        lines += [*_finding(rank, diagnosis), ""]
    lines += [f"Healthy: {len(checkup.healthy)}. Not examined: {len(checkup.unexamined)}.", ""]
    if checkup.unexamined:
        lines += [f"- {literal(reason)}: {', '.join(ids)}" for reason, ids in by_reason(checkup.unexamined)] + [""]
    if recording_stopped(chart.facts):
        lines += [f"Recording stopped: {literal(recording_stopped(chart.facts))}", ""]
    lines += [f"- Problem of sickbay itself: {literal(problem)}" for problem in problem_texts(chart.facts)]
    return "\n".join(lines).rstrip() + "\n"


def literal(text: str) -> str:
    """`text` with every character that Markdown or HTML could act on made harmless."""
    return _SPECIAL.sub(r"\\\1", one_line(text))


def code(text: str) -> str:
    """`text` as a code span, with a fence longer than any run of backticks inside."""
    text = one_line(text)
    fence = "`" * (max((len(run) for run in re.findall("`+", text)), default=0) + 1)
    pad = " " if "`" in text else ""
    return f"{fence}{pad}{text}{pad}{fence}"


def _finding(rank: int, diagnosis: Diagnosis) -> list[str]:
    place = [f"step {diagnosis.step}", *(code(text) for text in (diagnosis.where, diagnosis.source) if text)]
    certainty = "" if diagnosis.certainty == "confirmed" else f", {diagnosis.certainty}"
    lines = [f"### {rank}. {diagnosis.condition} ({diagnosis.severity}{certainty})", "", f"{literal(diagnosis.summary)}", ""]
    lines.append(f"- At {', '.join(place)}")
    lines += [f"- {literal(str(evidence))}" for evidence in diagnosis.evidence]
    if diagnosis.explains:
        lines.append(f"- Leads to {', '.join(diagnosis.explains)}")
    treatment = registry.treatment_for(diagnosis)
    if treatment:
        lines.append(f"- **{treatment.id}** ({treatment.safety}): {literal(treatment.summary)}")
    return lines
