"""Runs the bugs of examples/museum and their repaired twins under `sickbay run` and prints whether the cause came first.

    python bench/museum.py [--only REGEX] [--jobs N] [--keep DIR] [--write] [--readme]

Each script is sick as it is and healthy with the word `fixed`. Its docstring says what was reported and ends in lines of their own:

    Thread: https://...        the report (more than one line is possible)
    Condition: ID              what must be named first in the sick one
    Also: ID, ID               consequences that may stand beside it (optional)
    Launch: torchrun           two processes (optional)
    Exit: CODE                 the sick script's exit code, where it ends in an exception (optional)
    Checkup: SICK, FIXED       two functions of the script for `sickbay checkup`, instead of a run (optional)

`--write` puts the table into RESULTS.md, `--readme` the list of cases into examples/museum/README.md (and runs nothing).
"""

from __future__ import annotations

import argparse
import ast
import json
import re
import subprocess
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import results
import zoo

MUSEUM = zoo.ROOT / "examples" / "museum"
HEAD = """# The museum

Bugs that people met and reported, each as a training script of a few seconds on a CPU. None knows of sickbay.

    sickbay run examples/museum/clip_scaled.py          # sick: the cause is named first
    sickbay run examples/museum/clip_scaled.py fixed    # with the smallest repair: nothing is found

A script is not the reported program: it is the same mistake in a small model. Its docstring says what was reported, and what was only
like it. `python bench/museum.py` runs all of them; the list below is written by `python bench/museum.py --readme`.
"""


@dataclass(frozen=True)
class Exhibit:
    """One bug. `threads`: addresses of the reports; `functions`: the two that `sickbay checkup` is given, empty for a run."""

    path: Path
    doc: str
    condition: str
    also: tuple[str, ...]
    threads: tuple[str, ...]
    launcher: str
    functions: tuple[str, ...]
    code: int = 0

    @property
    def name(self) -> str:
        return self.path.stem

    @property
    def title(self) -> str:
        return self.doc.splitlines()[0].rstrip(".") if self.doc else ""

    def case(self, fixed: bool) -> zoo.Case:
        """The sick run, or that of the healthy twin, in which nothing may be found."""
        words = ["fixed"] if fixed else []
        expected = [] if fixed else [self.condition]
        return zoo.Case(str(self.path), words, expected, [] if fixed else list(self.also), self.launcher, 0 if fixed else self.code)


def exhibits(folder: Path = MUSEUM) -> list[Exhibit]:
    """All bugs of the museum, in order of name."""
    return [read(path) for path in sorted(folder.glob("*.py"))]


def read(path: Path) -> Exhibit:
    """The exhibit that the script's docstring describes; what it leaves out is empty."""
    doc = ast.get_docstring(ast.parse(path.read_text(encoding="utf-8"))) or ""

    def lines(key: str) -> tuple[str, ...]:
        return tuple(re.findall(rf"^{key}: *(\S.*?) *$", doc, re.MULTILINE))

    def words(key: str) -> tuple[str, ...]:
        return tuple(word for line in lines(key) for word in re.split(r"[,\s]+", line))

    first = (*lines("Condition"), "")[0]
    launcher, code = (*lines("Launch"), "python")[0], (*lines("Exit"), "0")[0]
    return Exhibit(path, doc, first, words("Also"), lines("Thread"), launcher, words("Checkup"), int(code))


def run(exhibit: Exhibit, fixed: bool, out: Path) -> zoo.Result:
    """What sickbay said of the sick script or of its twin."""
    case = exhibit.case(fixed)
    if not exhibit.functions:
        return zoo.run(case, out)
    target = f"{exhibit.path}:{exhibit.functions[int(fixed)]}"
    command = [sys.executable, "-m", "sickbay", "checkup", "--json", target]
    try:
        done = subprocess.run(command, capture_output=True, env=zoo.environment(), timeout=zoo.LIMIT)
        answer = json.loads(done.stdout)
    except (OSError, ValueError, subprocess.TimeoutExpired) as problem:
        return zoo.Result(case, problem=f"{type(problem).__name__}: {problem}"[:200])
    return zoo.Result(case, [(d["condition"], d["severity"], d["summary"]) for d in answer["findings"]])


def readme() -> str:
    """The text of examples/museum/README.md."""
    rows = [
        [f"[{e.name}]({e.path.name})", e.title, f"`{e.condition}`", " ".join(f"[{_short(t)}]({t})" for t in e.threads)] for e in exhibits()
    ]
    return f"{HEAD}\n{results.table(['script', 'what is wrong', 'condition', 'reported in'], rows)}\n"


def _short(address: str) -> str:
    """`owner/name#number` of a thread on GitHub, the host of any other address."""
    found = re.match(r"https://github\.com/([^/]+/[^/]+)/(?:issues|pull)/(\d+)", address)
    return f"{found[1]}#{found[2]}" if found else address.split("/")[2]


def report(done: list[tuple[Exhibit, zoo.Result, zoo.Result]]) -> str:
    """The section for RESULTS.md."""
    rows = [
        [e.name, f"`{e.condition}`", "yes" if sick.first(1) and not sick.problem else f"no: {_found(sick)}", _found(well)]
        for e, sick, well in done
    ]
    first, quiet = sum(s.first(1) and not s.problem for _, s, _ in done), sum(w.right for *_, w in done)
    head = f"{len(done)} reported bugs: the cause named first in {first}; {quiet} of {len(done)} repaired twins without an alarm."
    table = results.table(["script", "condition", "named first", "alarms in its twin"], rows)
    return f"## Museum\n\n{head}\n\n{table}\n\n{results.conditions()}"


def _found(result: zoo.Result) -> str:
    alarms = ", ".join(condition for condition, severity, _ in result.found[:3] if severity != "note")
    return result.problem.splitlines()[0][:80] if result.problem else alarms or "none"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("--only", default="", help="a regular expression on the script's name")
    parser.add_argument("--jobs", type=int, default=1)
    parser.add_argument("--keep", type=Path, help="the runs' folders stay here")
    parser.add_argument("--write", action="store_true", help="the table goes into RESULTS.md")
    parser.add_argument("--readme", action="store_true", help="the list of cases goes into examples/museum/README.md; nothing is run")
    options = parser.parse_args()
    if options.readme:
        (MUSEUM / "README.md").write_text(readme(), encoding="utf-8")
        return 0
    chosen = [exhibit for exhibit in exhibits() if re.search(options.only, exhibit.name)]
    done = []
    with tempfile.TemporaryDirectory() as scratch, ThreadPoolExecutor(options.jobs) as pool:
        folder = (options.keep or Path(scratch)).resolve()
        folder.mkdir(parents=True, exist_ok=True)
        both = [(e, [pool.submit(run, e, fixed, folder / f"{e.name}{'_fixed' * fixed}") for fixed in (False, True)]) for e in chosen]
        for exhibit, runs in both:
            sick, well = (future.result() for future in runs)
            done.append((exhibit, sick, well))
            zoo.show(sick)
            zoo.show(well)
    first, quiet = sum(s.first(1) and not s.problem for _, s, _ in done), sum(w.right for *_, w in done)
    print(f"{len(done)} bugs: named first {first}, twins without an alarm {quiet}")
    if options.write:
        results.put("museum", report(done))
    return 0 if all(sick.right and well.right for _, sick, well in done) else 1


if __name__ == "__main__":
    sys.exit(main())
