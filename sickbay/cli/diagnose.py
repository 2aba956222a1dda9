"""Examines recorded runs anew, without torch and without running anything.

Prints one card per run; with --json one line of JSON per run, in the form of report.json.
Exit code: 0 if nothing was found, 1 if a critical or a warning was, 2 if a run cannot be read.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from sickbay.core.chart import Chart

NAME = "diagnose"
FINDINGS_EXIT = 1


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of `sickbay diagnose`."""
    parser.add_argument("runs", metavar="RUN", nargs="+", help="a folder that `sickbay run` wrote")
    parser.add_argument("--select", metavar="IDS", action="append", default=[], help="only these conditions or chapters, comma-separated")
    parser.add_argument("--ignore", metavar="IDS", action="append", default=[], help="not these conditions or chapters, comma-separated")
    parser.add_argument("--json", action="store_true", help="one line of JSON per run on stdout")


def main(args: argparse.Namespace) -> int:
    """0 if all runs are clean, 1 if something was found in one. Raises RecordError or UsageError."""
    from sickbay import registry
    from sickbay.core.condition import checkup
    from sickbay.report import record, terminal

    asked = registry.chosen(names(args.select), names(args.ignore))
    # All are read before the first is shown, so that a mistyped folder costs no half answer.
    charts = [(folder, recorded(folder)) for folder in args.runs]
    found = False
    for folder, chart in charts:
        verdict = checkup(chart, asked)
        found = found or verdict.verdict == "sick"
        if args.json:
            print(json.dumps(record.report(chart, verdict), allow_nan=False))
            continue
        if len(charts) > 1:
            print(terminal.encodable(f"== {folder}", sys.stdout.encoding))
        page = Path(folder) / "report.html"
        terminal.show(chart, verdict, str(page) if page.is_file() else "", file=sys.stdout)
        if len(charts) > 1:
            print()
    return FINDINGS_EXIT if found else 0


def recorded(folder: str) -> Chart:
    """The chart recorded in `folder`, with the facts (exit code, how it ended ...) that its report.json adds. Raises RecordError."""
    from sickbay.core.reader import load_chart
    from sickbay.report.record import remembered_facts

    chart = load_chart(folder)
    chart.facts.update({key: value for key, value in remembered_facts(folder).items() if key not in chart.facts})
    return chart


def names(options: Iterable[str]) -> list[str]:
    """The names in repeated, comma-separated options."""
    return [name for option in options for name in option.replace(",", " ").split()]
