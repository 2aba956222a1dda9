"""A checklist as a table of exams with the findings beneath it: for terminals, logs and notebooks."""

from __future__ import annotations

import sys
from html import escape
from io import StringIO
from typing import TextIO

from rich.console import Console
from rich.table import Table
from rich.text import Text

from sickbay.checklist.result import Checklist, Finding
from sickbay.report.terminal import PLAIN_WIDTH, SEVERITY_STYLE, VERDICT_STYLE, encodable
from sickbay.report.words import duration, one_line

ROW_STYLE = {"ok": "green", "found": "bold red", "not examined": "yellow"}


def show(checklist: Checklist, file: TextIO | None = None) -> None:
    """The checklist is on `file` (default stdout): coloured on a terminal, plain text anywhere else."""
    file = file if file is not None else sys.stdout
    console = Console(file=file, highlight=False, markup=False, emoji=False)
    if not console.is_terminal or not console.encoding.startswith("utf"):
        file.write(encodable(plain(checklist), getattr(file, "encoding", None)))
        return
    _print(checklist, console)


def plain(checklist: Checklist, width: int = PLAIN_WIDTH) -> str:
    """The checklist without colours, lines at most `width` columns."""
    page = StringIO()
    _print(checklist, Console(file=page, width=width, highlight=False, markup=False, emoji=False, color_system=None))
    return "".join(line.rstrip() + "\n" for line in page.getvalue().splitlines())


def html(checklist: Checklist) -> str:
    """The checklist as an HTML fragment that brings nothing in from outside."""
    return f"<pre>{escape(plain(checklist))}</pre>"


def _print(checklist: Checklist, console: Console) -> None:
    console.print(
        Text.assemble(("sickbay checkup  ", "bold"), (one_line(checklist.target), "bold"), (f"  {duration(checklist.seconds)}", "dim"))
    )
    console.print(Text(_verdict(checklist), style=VERDICT_STYLE[checklist.verdict]))
    if checklist.stopped:
        console.print(Text(f"stopped early: {one_line(checklist.stopped)}", style="yellow"))
    console.print()
    table = Table(box=None, pad_edge=False, show_header=True, header_style="dim", padding=(0, 2, 0, 0))
    table.add_column("exam", no_wrap=True)
    table.add_column("verdict", no_wrap=True)
    table.add_column("measured, or why not", overflow="fold")
    for row in checklist.rows:
        text = one_line(row.text)
        if row.verdict == "found" and row.conditions:
            text = f"{', '.join(row.conditions)}{': ' if text else ''}{text}"
        table.add_row(Text(row.exam), Text(row.verdict, style=ROW_STYLE[row.verdict]), Text(text))
    console.print(table)
    for rank, finding in enumerate(checklist.findings, 1):
        _print_finding(rank, finding, console)
    for problem in checklist.problems:
        console.print(Text(f"sickbay's own problem: {one_line(problem)}", style="yellow"), soft_wrap=False)


def _verdict(checklist: Checklist) -> str:
    counts = [(severity, sum(f.severity == severity for f in checklist.findings)) for severity in ("critical", "warning", "note")]
    told = ", ".join(f"{count} {severity}{'s' if count > 1 else ''}" for severity, count in counts if count)
    if checklist.verdict == "sick":
        return f"SICK: {told}"
    if checklist.verdict == "unexamined":
        return "NOT EXAMINED: no exam could be made"
    return "CLEAN: nothing was found" if not told else f"CLEAN: nothing that would alarm ({told})"


def _print_finding(rank: int, finding: Finding, console: Console) -> None:
    from sickbay import registry

    console.print()
    console.print(
        Text.assemble(
            (f"{rank} ", "dim"),
            (finding.condition, SEVERITY_STYLE[finding.severity]),
            (f"  {finding.severity}" + ("" if finding.certainty == "confirmed" else f", {finding.certainty}"), "dim"),
            (f"  {one_line(finding.where)}" if finding.where else "", "cyan"),
            (f"  ({one_line(finding.source)})" if finding.source else "", "bold"),
        )
    )
    for text, style in (
        (finding.summary, ""),
        (finding.numbers, "dim"),
        (f"leads to {', '.join(finding.explains)}" if finding.explains else "", "dim"),
        (f"cure: {finding.cure}" if finding.cure else "", "green"),
        (f"sickbay explain {finding.condition}" if finding.condition in registry.conditions() else "", "dim"),
    ):
        if text:
            console.print(Text("  " + one_line(text), style=style))
