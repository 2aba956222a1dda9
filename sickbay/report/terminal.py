"""The closing card: what was found, where, by which numbers, and the way out, in at most 40 lines."""

from __future__ import annotations

import sys
from collections.abc import Iterable, Sequence
from io import StringIO
from typing import TextIO

from rich.cells import cell_len
from rich.console import Console
from rich.text import Text

from sickbay import registry
from sickbay.core.chart import Chart
from sickbay.core.diagnosis import Checkup, Diagnosis, number
from sickbay.report.words import by_reason, duration, ended, num_steps, one_line, problem_texts, recording_stopped, shorten, verdict_line

MAX_LINES = 40
PLAIN_WIDTH = 100
MIN_WIDTH = 24
LONGEST_NAME = 80
SEVERITY_STYLE = {"critical": "bold red", "warning": "bold yellow", "note": "bold blue"}
VERDICT_STYLE = {"sick": "bold red", "healthy": "bold green", "unexamined": "bold yellow"}
# What terminals without UTF-8 cannot show, said in ASCII; any other such character is shown as its escape.
ASCII = str.maketrans(
    {"×": "x", "÷": "/", "≤": "<=", "≥": ">=", "–": "-", "—": "-", "→": "->", "…": "...", "√": "sqrt", "Δ": "d", "‖": "|"}
)


def show(chart: Chart, checkup: Checkup, page: str = "", file: TextIO | None = None, max_lines: int | None = MAX_LINES) -> None:
    """The card is on `file` (default stderr): coloured on a terminal, plain text anywhere else. `page`: path of the HTML report."""
    file = file if file is not None else sys.stderr
    console = Console(file=file, highlight=False, markup=False, emoji=False)
    if not console.is_terminal or not console.encoding.startswith("utf"):
        text = plain_card(chart, checkup, page, max_lines=max_lines)
        file.write(encodable(text, getattr(file, "encoding", None)))
        return
    width = max(MIN_WIDTH, console.width - 1)  # a full last column makes some terminals wrap
    for line in card(chart, checkup, page, width, max_lines):
        console.print(line, soft_wrap=True)


def plain_card(chart: Chart, checkup: Checkup, page: str = "", width: int = PLAIN_WIDTH, max_lines: int | None = MAX_LINES) -> str:
    """The card without any colour or control character, each line at most `width` columns."""
    return "".join(line.plain.rstrip() + "\n" for line in card(chart, checkup, page, width, max_lines))


def encodable(text: str, encoding: str | None) -> str:
    """`text` in characters that `encoding` has."""
    encoding = encoding or "utf-8"
    try:
        text.encode(encoding)
    except UnicodeEncodeError:
        return text.translate(ASCII).encode(encoding, "backslashreplace").decode(encoding)
    return text


def card(chart: Chart, checkup: Checkup, page: str = "", width: int = PLAIN_WIDTH, max_lines: int | None = MAX_LINES) -> list[Text]:
    """The card's lines, none wider than `width` columns, at most `max_lines` of them (None: all).

    The first finding is always there; those that do not fit are named on one line.
    """
    width = max(width, MIN_WIDTH)
    few = max_lines is not None
    blocks = [_finding(rank, diagnosis, width, few) for rank, diagnosis in enumerate(checkup.diagnoses, 1)]
    head = [*_wrap(_headline(chart), width), *_wrap(_verdict(checkup), width)]
    foot = _foot(chart, checkup, width, few)
    path = _wrap(_text(("report ", "dim"), (one_line(page), "underline")), width, indent=2) if page else []
    if max_lines is None:
        return [*head, *(line for block in blocks for line in block), *foot, *path]
    foot = [*foot[: max_lines // 3], *path]
    room = max_lines - len(head) - len(foot)
    for shown in range(len(blocks), 0, -1):
        lines = [*(line for block in blocks[:shown] for line in block), *_left_out(checkup.diagnoses[shown:], width)]
        if len(lines) <= room:
            return [*head, *lines, *foot]
    rest = _left_out(checkup.diagnoses[1:], width)
    first = blocks[0][: max(0, room - len(rest))] if blocks else []
    return [*head, *first, *rest, *foot][-max_lines:]


def _left_out(diagnoses: Sequence[Diagnosis], width: int) -> list[Text]:
    if not diagnoses:
        return []
    return _wrap(_text(("\n", ""), (f"and {len(diagnoses)} more: ", "bold"), (_names(d.condition for d in diagnoses), "")), width)[:4]


def _headline(chart: Chart) -> Text:
    facts = chart.facts
    script = shorten(one_line(facts.get("script") or ""), LONGEST_NAME)
    steps = num_steps(chart)
    what = f"{steps:,} optimizer step{'' if steps == 1 else 's'}"
    if isinstance(facts.get("seconds"), (int, float)):
        what += f" in {duration(float(facts['seconds']))}"
    how = shorten(ended(facts), LONGEST_NAME)
    return _text(("sickbay  ", "bold"), (f"{script}  " if script else "", "bold"), (what + (f", {how}" if how else ""), "dim"))


def _verdict(checkup: Checkup) -> Text:
    return _text((verdict_line(checkup), VERDICT_STYLE[checkup.verdict]))


def _finding(rank: int, diagnosis: Diagnosis, width: int, few: bool) -> list[Text]:
    where = shorten(one_line(diagnosis.where), max(16, width - 12))
    source = shorten(one_line(diagnosis.source), max(16, width - 12))
    title = _text(
        ("\n", ""),
        (f"{rank} ", "dim"),
        (diagnosis.condition, SEVERITY_STYLE[diagnosis.severity]),
        (f"  {diagnosis.severity}" + ("" if diagnosis.certainty == "confirmed" else f", {diagnosis.certainty}"), "dim"),
        (f"  step {diagnosis.step}", ""),
        (f"  {where}" if where else "", "cyan"),
        (f"  ({source})" if source else "", "bold"),
    )
    lines = _wrap(title, width, indent=2)
    lines += _wrap(_text(("  " + one_line(diagnosis.summary), "")), width, indent=2)[: 5 if few else None]
    if diagnosis.evidence:
        shown = [one_line(evidence) for evidence in diagnosis.evidence[: 3 if few else None]]
        lines += _wrap(_text(("  " + "; ".join(shown), "dim")), width, indent=2)[: 4 if few else None]
    if diagnosis.explains:
        lines += _wrap(_text(("  leads to ", "dim"), (_names(diagnosis.explains), "")), width, indent=2)
    treatment = registry.treatment_for(diagnosis)
    explain = _text(("sickbay explain " + diagnosis.condition, "dim"))
    if treatment is None:
        return lines + _wrap(_text(("  ", "")) + explain, width, indent=2)
    fix = _text(("  ", ""), (treatment.id, "bold green"), (f" [{treatment.safety}]: ", "dim"), (one_line(treatment.summary), ""))
    both = fix + _text(("   |   ", "dim")) + explain
    if cell_len(both.plain) <= width:
        return [*lines, both]
    return lines + _wrap(fix, width, indent=2) + _wrap(_text(("  ", "")) + explain, width, indent=2)


def _foot(chart: Chart, checkup: Checkup, width: int, few: bool) -> list[Text]:
    lines: list[Text] = [Text("")]
    stopped = recording_stopped(chart.facts)
    if stopped:
        lines += _wrap(_text(("recording stopped: ", "yellow"), (stopped, "")), width, indent=2)[: 3 if few else None]
    problems = problem_texts(chart.facts)
    for problem in problems[: 2 if few else None]:
        lines += _wrap(_text(("sickbay's own problem: ", "yellow"), (problem, "")), width, indent=2)[: 2 if few else None]
    if few and len(problems) > 2:
        lines += _wrap(_text((f"and {len(problems) - 2} more in the report", "yellow")), width, indent=2)
    counts = f"healthy {number(len(checkup.healthy))}   not examined {number(len(checkup.unexamined))}"
    lines += _wrap(_text((counts, "bold")), width)
    reasons = by_reason(checkup.unexamined)
    for reason, ids in reasons[: 4 if few else None]:
        line = _text((f"  {one_line(reason)}: ", "dim"), (_names(ids, at_most=3 if few else len(ids)), "dim"))
        lines += _wrap(line, width, indent=4)[: 2 if few else None]
    if few and len(reasons) > 4:
        lines += _wrap(_text((f"  and {len(reasons) - 4} more reasons: see the report", "dim")), width, indent=4)
    return lines


def _names(ids: Iterable[str], at_most: int = 8) -> str:
    listed = list(ids)
    more = len(listed) - at_most
    return ", ".join(listed[:at_most]) + (f" and {more} more" if more > 0 else "")


def _text(*parts: tuple[str, str]) -> Text:
    # Text.append takes no markup: a module called "[red]" stays what it is.
    text = Text()
    for string, style in parts:
        text.append(string, style or None)
    return text


def _wrap(text: Text, width: int, indent: int = 0) -> list[Text]:
    """`text` as lines of at most `width` columns, all but the first indented; words too long for a line are folded."""
    lines: list[Text] = []
    for paragraph in text.split("\n", allow_blank=True):
        if cell_len(paragraph.plain) <= width:
            lines.append(paragraph)
            continue
        console = Console(file=StringIO(), width=width - indent)
        folded = paragraph.wrap(console, width - indent, overflow="fold")
        for place, line in enumerate(folded):
            line.rstrip()
            lines.append(_text((" " * indent, "")) + line if place else line)
    return lines
