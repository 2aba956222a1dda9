"""Puts report.json and report.html into a run's folder, each whole or not at all."""

from __future__ import annotations

import os
from pathlib import Path

from sickbay.core.chart import Chart
from sickbay.core.diagnosis import Checkup
from sickbay.report import page, record


def write_report(folder: str | os.PathLike[str], chart: Chart, checkup: Checkup) -> str | None:
    """`folder` holds report.json and report.html of this checkup; returns None, or what could not be written and why.

    A reader never sees half a file: each is written beside its place and renamed into it.
    report.json comes first, so that a page that cannot be drawn costs only the page.
    """
    problems = []
    for name, render in (("report.json", _json), ("report.html", page.page)):
        try:
            write_whole(Path(folder) / name, render(chart, checkup))
        except OSError as problem:
            problems.append(f"{Path(folder) / name} could not be written: {problem.strerror or problem}")
        except Exception as problem:  # the run's verdict must come out even if one form of it cannot be made
            problems.append(f"{name} could not be made: {type(problem).__name__}: {problem}")
    return "; ".join(problems) or None


def write_whole(path: Path, text: str) -> None:
    """`path` holds exactly `text` (UTF-8), or what it held before. Raises OSError."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        temporary.write_bytes(text.encode("utf-8", "backslashreplace"))
        os.replace(temporary, path)
    except BaseException:
        try:
            temporary.unlink(missing_ok=True)
        except OSError:  # the first problem is the one to report
            pass
        raise


def _json(chart: Chart, checkup: Checkup) -> str:
    return record.to_json(record.report(chart, checkup))
