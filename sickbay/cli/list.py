"""Lists every condition that sickbay can recognise: chapter, id and symptom."""

from __future__ import annotations

import argparse
import json
import sys

NAME = "list"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """`--json` alone."""
    parser.add_argument("--json", action="store_true", help="print the list as JSON")


def main(args: argparse.Namespace) -> int:
    """The catalogue is on stdout; returns 0."""
    from sickbay.registry import conditions

    rows = [(condition.chapter, condition.id, condition.symptom) for condition in conditions().values()]
    if args.json:
        print(json.dumps([dict(zip(("chapter", "id", "symptom"), row)) for row in rows], indent=2, ensure_ascii=False))
    elif sys.stdout.isatty():
        _table(rows)
    else:
        widths = [max((len(row[column]) for row in rows), default=0) for column in (0, 1)]
        for chapter, id_, symptom in rows:
            print(f"{chapter:<{widths[0]}}  {id_:<{widths[1]}}  {symptom}")
    return 0


def _table(rows: list[tuple[str, str, str]]) -> None:
    from rich import box
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    table = Table(box=box.SIMPLE_HEAD)
    for heading in ("chapter", "condition", "symptom"):
        table.add_column(heading, no_wrap=heading == "condition")
    before = ""
    for chapter, id_, symptom in rows:
        table.add_row(Text(chapter if chapter != before else ""), Text(id_, style="bold"), Text(symptom))
        before = chapter
    Console().print(table)
