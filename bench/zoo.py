"""Runs the scripts of tests/zoo under `sickbay run` and prints whether the right cause came first.

    python bench/zoo.py [--only REGEX] [--jobs N] [--keep DIR]

A sick script counts in top-1 when its first diagnosis is one of the case's `expected`, in top-3 when one of the first three is. A
critical or warning outside `expected` and `acceptable` is a wrong alarm; on a healthy script (`expected` empty) a false one.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
ZOO = ROOT / "tests" / "zoo"
LIMIT = 300  # seconds for one script on a busy machine


@dataclass
class Case:
    """One run of one script. `expected`: conditions of which one must come first, none for a healthy run; `code`: its exit code."""

    script: str
    args: list[str] = field(default_factory=list)
    expected: list[str] = field(default_factory=list)
    acceptable: list[str] = field(default_factory=list)
    launcher: str = "python"
    code: int = 0
    fast: bool = False

    @property
    def name(self) -> str:
        return " ".join([Path(self.script).stem, *self.args])


@dataclass
class Result:
    """What the report said: `found` (condition, severity, summary), most important first; `problem` if there is no report to read."""

    case: Case
    found: list[tuple[str, str, str]] = field(default_factory=list)
    problem: str = ""

    @property
    def alarms(self) -> list[str]:
        """Criticals and warnings that are neither expected nor acceptable."""
        known = {*self.case.expected, *self.case.acceptable}
        return [condition for condition, severity, _ in self.found if severity != "note" and condition not in known]

    def first(self, count: int) -> bool:
        """True if one of the expected conditions is among the first `count`."""
        return any(condition in self.case.expected for condition, *_ in self.found[:count])

    @property
    def right(self) -> bool:
        return not self.problem and not self.alarms and (self.first(1) or not self.case.expected)


def cases(folder: Path = ZOO) -> list[Case]:
    """The cases of every list in `folder`, in order of file name."""
    return [Case(**row) for file in sorted(folder.glob("*.json")) for row in json.loads(file.read_text(encoding="utf-8"))]


def run(case: Case, out: Path) -> Result:
    """The outcome of one case; its run's folder is `out`."""
    shutil.rmtree(out, ignore_errors=True)
    program = ["sickbay", "run", "--out", str(out), str(ZOO / case.script), *case.args]
    command = [sys.executable, "-m", *program]
    if case.launcher == "torchrun":
        command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "-m", *program]
    try:
        done = subprocess.run(command, cwd=out.parent, capture_output=True, env=environment(), timeout=LIMIT)
        report: dict[str, Any] = json.loads((out / "report.json").read_text(encoding="utf-8"))
    except (OSError, ValueError, subprocess.TimeoutExpired) as problem:
        return Result(case, problem=f"{type(problem).__name__}: {problem}"[:200])
    found = [(d["condition"], d["severity"], d["summary"]) for d in report["diagnoses"]]
    problem = "" if done.returncode == case.code else f"exit code {done.returncode}: " + done.stderr.decode(errors="replace")[-600:]
    return Result(case, found, problem)


def environment() -> dict[str, str]:
    """This process's environment in which the checkout's sickbay is found and nothing of a launcher is left."""
    kept = {k: v for k, v in os.environ.items() if not k.startswith(("SICKBAY", "RANK", "WORLD_SIZE", "TORCHELASTIC", "PYTEST"))}
    return {**kept, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT), "HF_HUB_OFFLINE": "1"}


def show(result: Result) -> None:
    """One line on stdout, and what was wanted and said where the result is not right."""
    shown = "; ".join(f"{condition} ({severity})" for condition, severity, _ in result.found[:4])
    print(f"{'ok ' if result.right else 'BAD'} {result.case.name:58} {shown or '-'}", flush=True)
    if not result.right:
        print(f"      wanted {result.case.expected or 'nothing'}  {result.problem}")
        for condition, _, summary in result.found[:3]:
            print(f"      {condition}: {summary[:200]}", flush=True)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("--only", default="", help="a regular expression on script and arguments")
    parser.add_argument("--jobs", type=int, default=1)
    parser.add_argument("--keep", type=Path, help="the runs' folders stay here")
    options = parser.parse_args()
    chosen = [case for case in cases() if re.search(options.only, case.name)]
    with tempfile.TemporaryDirectory() as scratch, ThreadPoolExecutor(options.jobs) as pool:
        folder = (options.keep or Path(scratch)).resolve()
        folder.mkdir(parents=True, exist_ok=True)
        outs = [folder / re.sub(r"[^\w.=-]+", "_", case.name) for case in chosen]
        results = []
        for result in pool.map(run, chosen, outs):
            results.append(result)
            show(result)
    sick, healthy = [r for r in results if r.case.expected], [r for r in results if not r.case.expected]
    print(f"sick {len(sick)}: top-1 {sum(r.first(1) for r in sick)}, top-3 {sum(r.first(3) for r in sick)}, ", end="")
    print(f"wrong alarms in {sum(bool(r.alarms) for r in sick)}")
    print(f"healthy {len(healthy)}: false alarms in {sum(bool(r.alarms) for r in healthy)}")
    return 0 if all(result.right for result in results) else 1


if __name__ == "__main__":
    sys.exit(main())
