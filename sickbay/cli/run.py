"""Runs a training script unchanged, watches it, and writes what was found.

The script gets its arguments, terminal, signals and exit code exactly as from plain Python; the findings are printed to
stderr after it has ended and kept in the run's folder (report.html, report.json and the record), whatever the end was.
Everything after SCRIPT (or -m MODULE) belongs to the script. SICKBAY=0 in the environment switches sickbay off.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import os
import sys
from datetime import datetime, timezone
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sickbay import launch
from sickbay.core.errors import SickbayError, UsageError
from sickbay.core.settings import Settings, switched_off
from sickbay.entry import unwatched_reason
from sickbay.script import Script
from sickbay.supervisor import Ended, die_by, supervise

if TYPE_CHECKING:
    from sickbay.core.chart import Chart
    from sickbay.core.diagnosis import Checkup

NAME = "run"
FINDINGS_EXIT = 10


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of `sickbay run`; the script's own words never reach `parser` (see `split`)."""
    parser.usage = "sickbay run [options] SCRIPT [ARGS ...]\n       sickbay run [options] -m MODULE [ARGS ...]"
    parser.add_argument("--out", metavar="DIR", default="", help="the run's folder (default sickbay-runs/<time>-<script>)")
    parser.add_argument("--select", metavar="IDS", action="append", default=[], help="only these conditions or chapters, comma-separated")
    parser.add_argument("--ignore", metavar="IDS", action="append", default=[], help="not these conditions or chapters, comma-separated")
    parser.add_argument("--max-steps", metavar="N", type=int, default=0, help="stop the script after N optimizer steps")
    parser.add_argument(
        "--fail-on", choices=("critical", "warning"), help=f"exit {FINDINGS_EXIT} if the script succeeded but this or worse was found"
    )
    parser.add_argument("--debug", action="store_true", help="keep sickbay's own frames in tracebacks (also SICKBAY_DEBUG=1)")
    parser.add_argument("--json", action="store_true", help="print report.json on stdout after the script's own output")
    parser.add_argument("--treat", default="off", help=argparse.SUPPRESS)


def split(parser: argparse.ArgumentParser, words: list[str]) -> tuple[list[str], list[str]]:
    """`words` divided into sickbay's options and the rest, which begins with the script or with `-m MODULE` and is the script's."""
    with_value = {option for action in parser._actions if action.nargs != 0 for option in action.option_strings}
    place = 0
    while place < len(words):
        word = words[place]
        if word == "--":
            return words[:place], words[place + 1 :]
        if word.startswith("-m") and not word.startswith("--"):
            return words[:place], ["-m", *([word[2:]] if len(word) > 2 else []), *words[place + 1 :]]
        if not word.startswith("-") or word == "-":
            return words[:place], words[place:]
        place += 2 if word in with_value else 1
    return words, []


def main(args: argparse.Namespace) -> int:
    """The script's own exit code, or its signal; 10 for findings under --fail-on. Raises UsageError before anything is started."""
    script = _script(args.untouched)
    if switched_off():
        command = script.command()
        os.execv(command[0], command)
    script.check()
    settings = _settings(args)
    rank = launch.Rank.here()
    folder = launch.run_folder(args.out, script.stem, rank)
    launch.is_running(folder, rank, True)
    try:
        ended = supervise(script.command(), script.environment(dataclasses.replace(settings, out=str(folder))))
    finally:
        launch.is_running(folder, rank, False)
    code = ended.exit_code
    if rank.rank == 0:
        try:
            code = _report(args, settings, script, rank, folder, ended)
        except KeyboardInterrupt:
            _say(f"the report was interrupted: `sickbay report {folder}` makes it from the record")
    if ended.signal:
        die_by(ended.signal)
    return code


def _script(words: list[str]) -> Script:
    if not words:
        raise UsageError("no script given: `sickbay run train.py`, or `sickbay run -m package.train`")
    if words[0] != "-m":
        return Script(words[0], tuple(words[1:]))
    if len(words) < 2:
        raise UsageError("-m needs a module: `sickbay run -m package.train`")
    return Script(words[1], tuple(words[2:]), module=True)


def _settings(args: argparse.Namespace) -> Settings:
    if args.treat != "off":
        raise UsageError(
            f"--treat {args.treat}: treating a run is not yet possible; leave it out, and apply the cure that the report names"
        )
    if args.max_steps < 0:
        raise UsageError(f"--max-steps {args.max_steps}: give a number of optimizer steps above 0")
    select, ignore = _names(args.select), _names(args.ignore)
    if select or ignore:
        from sickbay import registry

        registry.chosen(select, ignore)
    debug = args.debug or os.environ.get("SICKBAY_DEBUG", "") == "1"
    return Settings(select=select, ignore=ignore, max_steps=args.max_steps, debug=debug)


def _names(lists: list[str]) -> tuple[str, ...]:
    return tuple(name.strip() for names in lists for name in names.split(",") if name.strip())


def _report(args: argparse.Namespace, settings: Settings, script: Script, rank: launch.Rank, folder: Path, ended: Ended) -> int:
    """The verdict is written and shown; returns the exit code. Nothing that fails here changes what the script's end means."""
    still_running = launch.wait_for_siblings(folder, rank, failed=ended.exit_code != 0)
    try:
        from sickbay import registry
        from sickbay.core.condition import checkup
        from sickbay.report import record, terminal, write

        chart = recorded_chart(folder, script, rank, ended)
        if still_running:
            chart.facts["problems"] = [*chart.facts.get("problems", ()), f"ranks {still_running} had not ended when this was written"]
        verdict = checkup(chart, registry.chosen(settings.select, settings.ignore))
        problem = write.write_report(folder, chart, verdict)
        page = folder / "report.html"
        if problem:
            _say(problem)
        if sys.stderr is not None:
            terminal.show(chart, verdict, str(page) if page.exists() else "")
        if args.json and sys.stdout is not None:
            sys.stdout.write(record.to_json(record.report(chart, verdict)))
            sys.stdout.flush()
        return exit_code(args.fail_on, ended, verdict)
    except BrokenPipeError:
        # Whoever read our output has gone; Python would complain once more when it flushes at exit.
        nowhere = os.open(os.devnull, os.O_WRONLY)
        os.dup2(nowhere, 1)
        os.dup2(nowhere, 2)
    except Exception as problem:
        _say(f"the report could not be made: {type(problem).__name__}: {problem}; the record is in {folder}")
    return ended.exit_code


def exit_code(fail_on: str | None, ended: Ended, verdict: Checkup) -> int:
    """The script's own, but 10 if it succeeded and `fail_on` asks that a finding of that severity or worse should count."""
    counted = {"critical": {"critical"}, "warning": {"critical", "warning"}}.get(fail_on or "", set())
    if ended.exit_code == 0 and any(diagnosis.severity in counted for diagnosis in verdict.diagnoses):
        return FINDINGS_EXIT
    return ended.exit_code


def recorded_chart(folder: Path, script: Script, rank: launch.Rank, ended: Ended) -> Chart:
    """What was recorded of `script` in `folder`, with the facts of its end."""
    chart = _chart(folder, rank)
    chart.facts.update(_facts(script, rank, ended, chart))
    return chart


def _chart(folder: Path, rank: launch.Rank) -> Chart:
    """What was recorded; where nothing was, an empty chart that knows why."""
    from sickbay.core.chart import Chart
    from sickbay.core.signals import SIGNALS

    reason = unwatched_reason(str(folder), range(rank.world_size))
    if reason is None:
        try:
            from sickbay.core.reader import load_chart

            return load_chart(folder)
        except (SickbayError, ImportError) as problem:
            recorded = any(folder.glob("record-*.sqlite"))
            reason = (
                f"the record cannot be read: {problem}"
                if recorded
                else "nothing was recorded: sickbay did not get into the script's process"
            )
    return Chart(facts={"watched": False, "problems": [reason]}, unobserved=dict.fromkeys(SIGNALS, reason))


def _facts(script: Script, rank: launch.Rank, ended: Ended, chart: Chart) -> dict[str, Any]:
    started = datetime.fromtimestamp(ended.started, timezone.utc)
    return {
        "script": f"-m {script.name}" if script.module else script.name,
        "argv": list(script.arguments),
        "started": f"{started:%Y-%m-%dT%H:%M:%S}Z",
        "seconds": round(ended.seconds, 3),
        "exit_code": ended.exit_code,
        "signal": ended.signal or None,
        "ended": _how(ended, chart),
        "world_size": rank.world_size,
    }


def _how(ended: Ended, chart: Chart) -> str:
    """`ended` in report.json: finished, failed, killed, out-of-memory, or stalled if the watch had found that before the kill."""
    notes = [reading.note for reading in chart["exception"]]
    last = notes[-1] if notes else {}
    # Torch says it so on the CPU, where it has no exception class for it.
    no_memory = str(last.get("type")) in ("OutOfMemoryError", "MemoryError") or "can't allocate memory" in str(last.get("message"))
    if ended.out_of_memory or (ended.exit_code and no_memory):
        return "out-of-memory"
    if ended.signal:
        return "stalled" if chart.facts.get("stalled") else "killed"
    return "failed" if ended.exit_code else "finished"


def _say(text: str) -> None:
    with contextlib.suppress(OSError, AttributeError):  # stderr may be closed or full
        print(f"sickbay: {text}", file=sys.stderr)
