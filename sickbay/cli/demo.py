"""Trains a healthy transformer, then plants faults in it one by one and shows each found and cured; with ID, that fault alone.

Takes about a minute on two cores and needs no data of yours. Every run's report stays in the folder of the demo.
Exit code: 0 if every planted fault was found and cured, 1 if one was not.
"""

from __future__ import annotations

import argparse
import json
import linecache
import os
import sys
import textwrap
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any, TextIO

from sickbay.core.errors import UsageError

if TYPE_CHECKING:
    from sickbay.core.diagnosis import Diagnosis
    from sickbay.demonstration import Exhibit, Watched

NAME = "demo"
NOT_FOUND_EXIT = 1
WIDTH, WIDEST = 80, 100  # columns: where there is no terminal to ask, and the most that reads well
LABEL = 9  # columns
STEPS_BETWEEN_LINES = 100


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of `sickbay demo`."""
    parser.add_argument("id", metavar="ID", nargs="?", default="", help="plant this condition's fault alone; `sickbay list` shows the ids")
    parser.add_argument("--out", metavar="DIR", default="", help="the demo's folder (default sickbay-runs/<time>-demo)")
    parser.add_argument("--json", action="store_true", help="the result as JSON on stdout, the talk on stderr")


def main(args: argparse.Namespace) -> int:
    """0 if every planted fault was found and cured, else 1. Raises UsageError before anything is started."""
    from sickbay.registry import check_name

    if args.id:
        check_name(args.id)  # before torch is loaded
    from sickbay import demonstration

    asked = [demonstration.chosen(id_) for id_ in ([args.id] if args.id else demonstration.TOUR)]
    folder = _folder(args.out)
    stage = Stage(sys.stderr if args.json else sys.stdout)
    _be_small()
    began = time.monotonic()
    healthy, shown = None, []
    try:
        if not args.id:
            healthy = _healthy(stage, folder)
        for number, condition in enumerate(asked, 1):
            shown.append(_show(stage, folder, condition, number, len(asked)))
        if args.id:
            _detail(stage, shown[0])
        else:
            _close(stage, shown, time.monotonic() - began)
    except KeyboardInterrupt:
        stage.end_line()
        stage.line(f"stopped; the reports made so far are in {folder}", whole=True)
        raise
    if args.json:
        print(json.dumps(_result(healthy, shown, time.monotonic() - began), indent=2, ensure_ascii=False, allow_nan=False))
    return 0 if all(exhibit.found and exhibit.is_cured for exhibit in shown) else NOT_FOUND_EXIT


class Stage:
    """Where the demo talks: in colour and with a moving line on a terminal, as plain lines anywhere else."""

    def __init__(self, file: TextIO) -> None:
        from rich.console import Console

        self._console = Console(file=file, highlight=False, markup=False, emoji=False)
        self.is_terminal = self._console.is_terminal and self._console.encoding.startswith("utf")
        self.width = min(self._console.width - 1, WIDEST) if self.is_terminal else WIDTH
        self.file = file
        self._moving = False

    def line(self, text: str = "", style: str = "", whole: bool = False) -> None:
        """`text` on lines of its own, folded at the width; on one line if `whole`, as a path must be to be copied."""
        for part in [text] if whole else textwrap.wrap(text, self.width) or [""]:
            self._write(part, style)

    def row(self, label: str, text: str, style: str = "", code: bool = False) -> None:
        """`text` beside `label`, its further lines indented under the first; code is cut at the width, never folded."""
        room = self.width - LABEL - 2
        parts = [text if len(text) <= room else text[: room - 3] + "..."] if code else textwrap.wrap(text, room) or [""]
        for number, part in enumerate(parts):
            self._write(f"  {label if number == 0 else '':<{LABEL}}{part}", style)

    def moving(self, text: str) -> None:
        """`text` in place of the moving line's text; nothing where lines cannot move."""
        if self.is_terminal:
            self.file.write(f"\r\x1b[K{text[: self.width]}")
            self.file.flush()
            self._moving = True

    def end_line(self) -> None:
        """The moving line is gone."""
        if self._moving:
            self.file.write("\r\x1b[K")
            self._moving = False

    def _write(self, text: str, style: str) -> None:
        from rich.text import Text

        from sickbay.report.terminal import encodable

        self.end_line()
        if self.is_terminal:
            self._console.print(Text(text, style=style), soft_wrap=True)
        else:
            self.file.write(encodable(f"{text.rstrip()}\n", getattr(self.file, "encoding", None)))
            self.file.flush()


def _folder(asked: str) -> Path:
    """The demo's folder, made. Raises UsageError where it is taken or cannot be made."""
    folder = Path(asked) if asked else Path("sickbay-runs") / f"{time.strftime('%Y%m%d-%H%M%S')}-demo"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        if any(folder.iterdir()):
            raise UsageError(f"--out {folder}: the folder is not empty; give a new one")
        if not os.access(folder, os.W_OK):
            raise PermissionError(13, "Permission denied")
    except OSError as problem:
        raise UsageError(f"{folder} cannot be written: {problem.strerror}; give a writable folder with --out") from problem
    return folder


def _be_small() -> None:
    """One thread: models this small lose time to any further one."""
    import torch

    torch.set_num_threads(1)


def _healthy(stage: Stage, folder: Path) -> Watched:
    from sickbay import demonstration
    from sickbay.report.words import duration, verdict_line

    stage.line("A small transformer learns to write Shakespeare, watched by sickbay", "bold")

    def progress(step: int, steps: int, loss: float) -> None:
        text = f"step {step:>3}/{steps}  loss {loss:.3f}"
        if step in (1, steps) or step % STEPS_BETWEEN_LINES == 0:
            stage.row("", text)
        elif step % 5 == 0:
            stage.moving(f"  {'':<{LABEL}}{text}")

    run = demonstration.train_healthy(folder / "healthy", progress)
    style = "green" if run.checkup.verdict == "healthy" else "red"
    stage.row("verdict", f"{verdict_line(run.checkup)} ({duration(run.seconds)})", style)
    return run


def _show(stage: Stage, folder: Path, condition: Any, number: int, count: int) -> Exhibit:
    from sickbay import demonstration
    from sickbay.core.diagnosis import number as written

    stage.line()
    stage.line(f"{number}/{count}  {condition.id}" if count > 1 else condition.id, "bold")
    stage.moving("  training the reference with the fault, and again without it")
    exhibit = demonstration.exhibit(condition, folder)
    stage.row("planted", exhibit.planted)
    diagnosis = exhibit.diagnosis
    if diagnosis is None:
        stage.row("missed", "nothing was named", "red")
    else:
        style = "red" if not exhibit.found else "yellow"
        stage.row("found" if exhibit.found else "named", _whereabouts(diagnosis, full=not exhibit.found), style)
        stage.row("", diagnosis.summary)
        if diagnosis.source:
            stage.row("line", _shortened(diagnosis.source), "cyan")
            stage.row("", f"| {_code_at(diagnosis.source)}", "cyan", code=True)
        stage.row("evidence", "; ".join(str(evidence) for evidence in diagnosis.evidence[:2]), "dim")
    losses = exhibit.cured.chart["loss"].finite()
    told = f", loss {written(losses[0].value)} to {written(losses[-1].value)}" if len(losses) else ""
    if exhibit.is_cured:
        stage.row("cured", f"the same run without the fault: {exhibit.cured.checkup.verdict}{told}", "green")
    else:
        named = ", ".join(diagnosis.condition for diagnosis in exhibit.cured.checkup.diagnoses)
        stage.row("not cured", f"the same run without the fault: {named or exhibit.cured.failure!r}", "red")
    return exhibit


def _whereabouts(diagnosis: Diagnosis, full: bool) -> str:
    """Id (if `full`), severity, step, and module or parameter of the finding."""
    parts = (diagnosis.condition if full else "", diagnosis.severity, f"step {diagnosis.step}", diagnosis.where)
    return "  ".join(part for part in parts if part)


def _shortened(source: str) -> str:
    """`file:line` with the path as seen from the folder that holds sickbay."""
    home = str(Path(__file__).resolve().parents[2]) + os.sep
    return source.removeprefix(home)


def _code_at(source: str) -> str:
    """The line of code that `source` points to; empty where there is none."""
    path, _, line = source.rpartition(":")
    return linecache.getline(path, int(line)).strip() if line.isdigit() else ""


def _detail(stage: Stage, exhibit: Exhibit) -> None:
    """The fault's whole card, as `sickbay run` would show it, and its cure."""
    from sickbay.registry import treatments
    from sickbay.report import terminal

    stage.line()
    terminal.show(exhibit.sick.chart, exhibit.sick.checkup, str(exhibit.sick.page), file=stage.file)
    stage.line()
    for id_ in exhibit.condition.prescribes:
        treatment = treatments()[id_]
        stage.row("cure", f"{treatment.id} [{treatment.safety}]: {treatment.summary}", "green")
    stage.row("more", f"sickbay explain {exhibit.condition.id}")


def _close(stage: Stage, shown: list[Exhibit], seconds: float) -> None:
    """The card of the last fault, as `sickbay run` would show it, and the count."""
    from sickbay.report import terminal
    from sickbay.report.words import duration

    last = shown[-1]
    stage.line()
    stage.line("What `sickbay run` prints after such a script has ended:", "bold")
    stage.line()
    terminal.show(last.sick.chart, last.sick.checkup, str(last.sick.page), file=stage.file)
    stage.line()
    found, cured = sum(exhibit.found for exhibit in shown), sum(exhibit.is_cured for exhibit in shown)
    good = found == cured == len(shown)
    stage.line(f"{found} of {len(shown)} planted faults found, {cured} cured, in {duration(seconds)}", "bold green" if good else "bold red")
    for exhibit in shown:
        if not exhibit.found:
            stage.row("missed", exhibit.condition.id, "red")
    stage.line(f"report: {last.sick.page}", whole=True)
    stage.line("now your own: sickbay run train.py")


def _result(healthy: Watched | None, shown: list[Exhibit], seconds: float) -> dict[str, Any]:
    """What `--json` prints; `report` is each run's report.json."""
    from sickbay.report import record

    faults = [
        {
            "condition": exhibit.condition.id,
            "planted": exhibit.planted,
            "found": exhibit.found,
            "cured": exhibit.is_cured,
            "page": str(exhibit.sick.page),
            "report": record.report(exhibit.sick.chart, exhibit.sick.checkup),
        }
        for exhibit in shown
    ]
    return {
        "seconds": round(seconds, 1),
        "healthy": None if healthy is None else record.report(healthy.chart, healthy.checkup),
        "planted": len(shown),
        "found": sum(exhibit.found for exhibit in shown),
        "cured": sum(exhibit.is_cured for exhibit in shown),
        "faults": faults,
    }
