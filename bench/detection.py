"""How often each planted fault is named, how soon, what else is named beside it, and what is named in healthy runs.

python bench/detection.py                       every fault x 3 seeds x 2 sizes, every healthy variant x 1 seed
python bench/detection.py --seeds 1 --sizes tiny --only causal-leak
python bench/detection.py --write               also puts the tables into RESULTS.md
"""

from __future__ import annotations

import argparse
import itertools
import sys
import tempfile
import time
from collections.abc import Iterable
from dataclasses import dataclass

import apart
import results
import torch
from healthy_reference import variants

from sickbay.core.chart import Chart
from sickbay.core.condition import Condition, checkup, reachable
from sickbay.core.diagnosis import Checkup
from sickbay.core.reader import load_chart
from sickbay.reference.case import Case
from sickbay.reference.models.config import Config
from sickbay.reference.watched import watched
from sickbay.registry import conditions

SIZES = {
    "tiny": Config(dim=32, num_layers=2, num_heads=4, context=32),
    "small": Config(dim=64, num_layers=4, num_heads=4, context=64),
}


@dataclass(frozen=True)
class Outcome:
    """What was named in one run. `named`: root findings in order; `folded`: those beneath them; `after`: steps until it was named."""

    planted: str
    named: tuple[str, ...]
    folded: tuple[str, ...]
    alarms: tuple[str, ...]
    after: int | None
    seconds: float
    broken: tuple[str, ...]

    @property
    def rank(self) -> int | None:
        """1 = named first; None = not named."""
        return self.named.index(self.planted) + 1 if self.planted in self.named else None

    @property
    def unrelated(self) -> tuple[str, ...]:
        """The alarms that the planted fault does not lead to."""
        allowed = {self.planted, *reachable(self.planted, conditions())}
        return tuple(id_ for id_ in (*self.alarms, *self.folded) if id_ not in allowed)


def plant(condition: Condition, base: Case) -> Outcome:
    """The outcome of a watched run of `base` with the fault of `condition`."""
    assert condition.inject is not None, f"{condition.id} cannot be planted"
    return observe(condition.inject(base), condition)


def planted(id_: str, size: str, seed: int) -> Outcome:
    return plant(conditions()[id_], Case(config=SIZES[size], seed=seed))


def healthy_variant(name: str) -> Outcome:
    return observe(variants()[name])


def observe(case: Case, condition: Condition | None = None) -> Outcome:
    """The outcome of a watched run of `case`, in which `condition` was planted (None: nothing)."""
    started = time.monotonic()
    with tempfile.TemporaryDirectory() as folder:
        verdict, _ = watched(case, folder)
        seconds = time.monotonic() - started
        chart = load_chart(folder)
        after = steps_to_name(chart, condition) if condition is not None and names(verdict, condition.id) else None
    roots = verdict.diagnoses
    folded = tuple(id_ for diagnosis in roots for id_ in diagnosis.explains)
    alarms = tuple(diagnosis.condition for diagnosis in roots if diagnosis.severity != "note")
    broken = tuple(f"{id_}: {reason}" for id_, reason in verdict.unexamined.items() if "its rule failed" in reason)
    planted = condition.id if condition is not None else ""
    return Outcome(planted, tuple(diagnosis.condition for diagnosis in roots), folded, alarms, after, seconds, broken)


def names(verdict: Checkup, id_: str) -> bool:
    return any(id_ == diagnosis.condition or id_ in diagnosis.explains for diagnosis in verdict.diagnoses)


def steps_to_name(chart: Chart, condition: Condition) -> int:
    """How many optimizer steps had to be seen before `condition` could be named: 1 = the first alone."""
    readings = [reading for signal in chart.signals() for reading in chart[signal]]
    for step in range(chart.last_step + 1):
        seen = Chart([reading for reading in readings if reading.step <= step], chart.facts, chart.unobserved)
        if checkup(seen, [condition]).diagnoses:
            return step + 1
    return chart.last_step + 1


def main() -> int:
    """0 if every fault was named first in every run and no healthy run raised an alarm."""
    args = arguments()
    torch.set_num_threads(1)
    asked = [condition for condition in conditions().values() if condition.inject and (not args.only or condition.id in args.only)]
    runs: dict[str, list[tuple[str, Outcome]]] = {condition.id: [] for condition in asked if not args.healthy_only}
    for (id_, size, seed), outcome in apart.each(planted, itertools.product(runs, args.sizes, range(args.seeds)), args.jobs):
        runs[id_].append((f"{size}, seed {seed}", outcome or died(id_)))
        show(id_, *runs[id_][-1])
    healthy = {}
    for (name,), outcome in apart.each(healthy_variant, [(name,) for name in variants() if not args.only], args.jobs):
        healthy[name] = outcome or died("")
        show("healthy", name, healthy[name])
    text = "\n\n".join(part for part in (fault_table(runs), confusion(runs, healthy), healthy_table(healthy), results.conditions()) if part)
    print(text)
    if args.write:
        results.put("detection", f"## Detection\n\n{text}")
    good = all(outcome.rank == 1 and not outcome.unrelated for rows in runs.values() for _, outcome in rows)
    return 0 if good and not any(outcome.alarms for outcome in healthy.values()) else 1


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--sizes", nargs="+", choices=SIZES, default=list(SIZES))
    parser.add_argument("--only", nargs="+", metavar="ID", default=[], help="these faults alone, and no healthy runs")
    parser.add_argument("--healthy-only", action="store_true")
    parser.add_argument("--jobs", type=int, default=2, help="runs at a time")
    parser.add_argument("--write", action="store_true", help="put the tables into RESULTS.md")
    return parser.parse_args()


def died(id_: str) -> Outcome:
    return Outcome(id_, (), (), (), None, 0.0, ("the process ended without a result",))


def show(planted: str, run: str, outcome: Outcome) -> None:
    named = ", ".join(outcome.named) or "nothing"
    print(f"{planted:<28} {run:<44} {named} {outcome.seconds:.1f} s {' '.join(outcome.broken)}", file=sys.stderr, flush=True)


def fault_table(runs: dict[str, list[tuple[str, Outcome]]]) -> str:
    if not runs:
        return ""
    rows = []
    for id_, outcomes in runs.items():
        count = len(outcomes)
        first = sum(outcome.rank == 1 for _, outcome in outcomes)
        three = sum(outcome.rank is not None and outcome.rank <= 3 for _, outcome in outcomes)
        after = sorted(outcome.after for _, outcome in outcomes if outcome.after is not None)
        unrelated = sorted({id_ for _, outcome in outcomes for id_ in outcome.unrelated})
        soon = f"{after[len(after) // 2]} (at most {after[-1]})" if after else "never"
        rows.append([id_, f"{first}/{count}", f"{three}/{count}", soon, ", ".join(unrelated) or "none"])
    everything = [outcome for outcomes in runs.values() for _, outcome in outcomes]
    first = sum(outcome.rank == 1 for outcome in everything)
    three = sum(outcome.rank is not None and outcome.rank <= 3 for outcome in everything)
    extra = sum(bool(outcome.unrelated) for outcome in everything)
    summary = (
        f"{len(runs)} faults, {len(everything)} runs: named first in {first} ({first / len(everything):.1%}), among the first three in "
        f"{three} ({three / len(everything):.1%}); an alarm that the fault does not lead to in {extra}."
    )
    head = ["planted", "named first", "in first three", "steps seen before it could be named: median", "unrelated alarms"]
    return f"{summary}\n\n{results.table(head, rows)}"


def confusion(runs: dict[str, list[tuple[str, Outcome]]], healthy: dict[str, Outcome]) -> str:
    """What was named where something else than the planted fault was named at all; the rest of the matrix is empty."""
    rows = []
    usual = {name for outcome in healthy.values() for name in outcome.named}
    for id_, outcomes in runs.items():
        others = [name for _, outcome in outcomes for name in dict.fromkeys((*outcome.named, *outcome.folded)) if name != id_]
        counts = {name: others.count(name) for name in sorted(set(others))}
        if counts:
            led = reachable(id_, conditions())
            words = {name: "" if name in led else " (a note, as of healthy runs)" if name in usual else " (unrelated)" for name in counts}
            cells = (f"{name} {n}/{len(outcomes)}{words[name]}" for name, n in counts.items())
            rows.append([id_, ", ".join(cells)])
    if not rows:
        return "Off the diagonal nothing was named." if runs else ""
    return f"Off the diagonal (consequences stand beneath their cause in the report):\n\n{results.table(['planted', 'also named'], rows)}"


def healthy_table(healthy: dict[str, Outcome]) -> str:
    if not healthy:
        return ""
    alarms = {name: outcome.alarms for name, outcome in healthy.items() if outcome.alarms}
    notes = {name: outcome.named for name, outcome in healthy.items() if outcome.named and not outcome.alarms}
    text = f"{len(healthy)} healthy variants: {len(alarms)} with a critical or a warning, {len(notes)} with a note."
    text += "".join(f"\n- false alarm, {name}: {', '.join(ids)}" for name, ids in {**alarms}.items())
    text += "".join(f"\n- note, {name}: {', '.join(ids)}" for name, ids in notes.items())
    return f"{text}\n\nVariants: {'; '.join(listed(healthy))}."


def listed(names: Iterable[str]) -> list[str]:
    return sorted(names, key=str.lower)


if __name__ == "__main__":
    sys.exit(main())
