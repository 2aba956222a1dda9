"""Writes the report of a recorded run: as text, HTML, JSON or Markdown.

Reads the run's record and examines it anew; needs no torch. The report goes to stdout, or with --output to a file.
Exit code: 0 if nothing was found, 1 if a critical or a warning was, 2 if the run cannot be read.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from sickbay.core.errors import UsageError

if TYPE_CHECKING:
    from sickbay.core.chart import Chart
    from sickbay.core.diagnosis import Checkup

NAME = "report"
FORMATS = ("text", "html", "json", "markdown")
FINDINGS_EXIT = 1


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of `sickbay report`."""
    parser.add_argument("run", metavar="RUN", help="the folder that `sickbay run` wrote")
    parser.add_argument("--format", choices=FORMATS, default="text", help="default: text")
    parser.add_argument("--json", action="store_const", dest="format", const="json", help="the same as --format json")
    parser.add_argument("--output", metavar="FILE", default="", help="write to FILE instead of stdout")


def main(args: argparse.Namespace) -> int:
    """0 if the run is clean, 1 if something was found. Raises RecordError or UsageError."""
    from sickbay import registry
    from sickbay.cli.diagnose import recorded
    from sickbay.core.condition import checkup
    from sickbay.report import terminal

    chart = recorded(args.run)
    verdict = checkup(chart, registry.conditions().values())
    page = Path(args.run) / "report.html"
    if args.format == "text" and not args.output:
        terminal.show(chart, verdict, str(page) if page.is_file() else "", file=sys.stdout, max_lines=None)
    elif args.output:
        _write(Path(args.output), _rendered(args.format, chart, verdict))
    else:
        sys.stdout.write(terminal.encodable(_rendered(args.format, chart, verdict), sys.stdout.encoding))
    return FINDINGS_EXIT if verdict.verdict == "sick" else 0


def _rendered(format_: str, chart: Chart, verdict: Checkup) -> str:
    from sickbay.report import markdown, page, record, terminal

    if format_ == "html":
        return page.page(chart, verdict)
    if format_ == "json":
        return record.to_json(record.report(chart, verdict))
    if format_ == "markdown":
        return markdown.markdown(chart, verdict)
    return terminal.plain_card(chart, verdict, max_lines=None)


def _write(path: Path, text: str) -> None:
    from sickbay.report.write import write_whole

    try:
        write_whole(path, text)
    except OSError as problem:
        raise UsageError(f"--output {path}: cannot be written: {problem.strerror or problem}; give another file") from problem
