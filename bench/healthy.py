"""Runs healthy trainings under watch, many of them, and prints what was said of each: nothing critical and no warning is expected.

    python bench/healthy.py                 the reference's variants, and transformers' and torch's models
    python bench/healthy.py --only llama --jobs 2 --steps 30
    python bench/healthy.py --write         also puts the table into RESULTS.md

Each run has a process of its own, forked from one that has imported everything.
"""

from __future__ import annotations

import argparse
import contextlib
import functools
import io
import os
import re
import sys
import tempfile
import time
import warnings
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass

import apart
import healthy_models
import healthy_reference
import results
import torch

import sickbay
from sickbay.core.reader import load_chart
from sickbay.reference import case as reference

os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
SHORT = 24  # steps of a reference run, where its recipe does not say


@dataclass(frozen=True)
class Outcome:
    """What was said of one run: findings by severity, probes that failed, the exception that ended it; wall `seconds`."""

    name: str
    alarms: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()
    broken: tuple[str, ...] = ()
    failed: str = ""
    healthy: int = 0
    seconds: float = 0.0


def trainings(steps: int) -> dict[str, Callable[[], object]]:
    """Every run by name."""
    found: dict[str, Callable[[], object]] = {}
    for name, case in healthy_reference.variants(steps).items():
        found[f"reference, {name}"] = functools.partial(reference.run, case)
    for name, recipe in healthy_models.recipes().items():
        found[name] = functools.partial(healthy_models.train, recipe)
    return found


def observe(name: str, steps: int) -> Outcome:
    """The outcome of the training of that name, watched in this process."""
    torch.set_num_threads(1)
    started, failed = time.monotonic(), ""
    with tempfile.TemporaryDirectory() as folder, contextlib.redirect_stdout(io.StringIO()), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        training = trainings(steps)[name]
        try:
            with sickbay.watch(out=folder) as doctor:
                training()
        except Exception as problem:
            failed = f"{type(problem).__name__}: {problem}"[:200]
        verdict = doctor.checkup()
        problems = tuple(f"{each['probe']}: {each['error']}" for each in load_chart(folder).facts.get("problems", ()))
    said = [(diagnosis.severity, f"{diagnosis.condition}: {diagnosis.summary}") for diagnosis in verdict.diagnoses]
    alarms = tuple(text for severity, text in said if severity != "note")
    notes = tuple(text for severity, text in said if severity == "note")
    broken = problems + tuple(f"{id_}: {reason}" for id_, reason in verdict.unexamined.items() if "its rule failed" in reason)
    return Outcome(name, alarms, notes, broken, failed, len(verdict.healthy), time.monotonic() - started)


def main() -> int:
    """0 if no run was alarming, none failed, and no probe or rule broke."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", default="", help="a regular expression that the run's name holds")
    parser.add_argument("--jobs", type=int, default=2)
    parser.add_argument("--steps", type=int, default=SHORT)
    parser.add_argument("--write", action="store_true")
    args = parser.parse_args()
    names = [name for name in trainings(args.steps) if re.search(args.only, name)]
    healthy_models.MODELS["gpt2"][0](healthy_models.Recipe("gpt2"))  # the library is imported once, before the forks
    outcomes = []
    for (name, _), observed in apart.each(observe, [(name, args.steps) for name in names], args.jobs):
        outcome = observed or Outcome(name, failed="the process ended without a result")
        outcomes.append(outcome)
        said = " | ".join((*outcome.alarms, *outcome.broken, outcome.failed)).strip(" |") or "nothing"
        notes = f" ({len(outcome.notes)} notes)" if outcome.notes else ""
        print(f"{len(outcomes):>4} {outcome.name:<72} {outcome.seconds:5.1f} s  {said}{notes}", file=sys.stderr, flush=True)
    text = f"{table(outcomes)}\n\n{results.conditions()}"
    print(text)
    if args.write:
        results.put("healthy", f"## Healthy trainings\n\n{text}")
    return int(any(outcome.alarms or outcome.broken or outcome.failed for outcome in outcomes))


def table(outcomes: list[Outcome]) -> str:
    """Runs, alarms and notes by kind of model, and every finding that was made."""
    kinds: dict[str, list[Outcome]] = {}
    for outcome in outcomes:
        kinds.setdefault(re.split(r",", outcome.name)[0], []).append(outcome)
    heading = ["model", "runs", "with a critical or a warning", "with a note", "failed", "conditions examined and healthy: median"]
    rows = []
    for kind, runs in sorted(kinds.items()):
        counts = [sum(bool(getattr(run, what)) for run in runs) for what in ("alarms", "notes", "failed")]
        rows.append([kind, str(len(runs)), *map(str, counts), str(sorted(run.healthy for run in runs)[len(runs) // 2])])
    alarming = sum(bool(outcome.alarms) for outcome in outcomes)
    said = Counter(text.partition(":")[0] for outcome in outcomes for text in (*outcome.alarms, *outcome.notes))
    named = ", ".join(f"{condition} {count}" for condition, count in said.most_common()) or "none"
    summary = f"{len(outcomes)} runs: {alarming} with a critical or a warning. Findings of any severity: {named}."
    return f"{summary}\n\n{results.table(heading, rows)}"


if __name__ == "__main__":
    sys.exit(main())
