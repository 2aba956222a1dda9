"""Explains a condition: what it looks like, why it happens, how to tell it apart, the cure, and the sources."""

from __future__ import annotations

import argparse
import json
import sys

NAME = "explain"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The condition's id, and `--json`."""
    parser.add_argument("id", metavar="ID", help="a condition's id, as `sickbay list` shows it")
    parser.add_argument("--json", action="store_true", help="print the explanation as JSON")


def main(args: argparse.Namespace) -> int:
    """The condition's text is on stdout; returns 0. Raises UsageError with the nearest ids for an unknown one."""
    from sickbay.core.condition import HEADINGS, Condition
    from sickbay.core.errors import UsageError
    from sickbay.registry import check_name, conditions, treatments

    check_name(args.id)
    condition: Condition | None = conditions().get(args.id)
    if condition is None:
        ids = ", ".join(c.id for c in conditions().values() if c.chapter == args.id)
        raise UsageError(f"{args.id!r} is a chapter, with the conditions {ids or '(none yet)'}: name one of them")
    if args.json:
        fields = ("id", "chapter", "symptom", "needs", "uses", "prescribes", "leads_to", "doc")
        print(json.dumps({field: getattr(condition, field) for field in fields}, indent=2, ensure_ascii=False))
        return 0
    bold, plain = ("\033[1m", "\033[0m") if sys.stdout.isatty() else ("", "")
    print(f"{bold}{condition.id}{plain} ({condition.chapter})\n")
    for line in condition.doc.splitlines():
        print(f"{bold}{line}{plain}" if line in HEADINGS else line)
    cures = [treatments()[id_] for id_ in condition.prescribes if id_ in treatments()]
    for cure in cures:
        print(f"\n{bold}{cure.id}{plain} [{cure.safety}]: {cure.summary}")
    return 0
