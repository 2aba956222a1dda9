"""The checklist of a training script: its first steps, watched as by `sickbay run`, then stopped."""

from __future__ import annotations

import time
from collections.abc import Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING

from sickbay.core.errors import UsageError

if TYPE_CHECKING:
    from sickbay.checklist.result import Checklist, Row
    from sickbay.core.chart import Chart
    from sickbay.core.diagnosis import Checkup

_IN_HAND = "it needs the model in hand: name a function that returns (model, batches, loss)"


def examine_script(words: Sequence[str], max_steps: int, only: Sequence[str], skip: Sequence[str]) -> Checklist:
    """The verdicts over the first `max_steps` steps of the script `words`. Raises UsageError if it is none, or ended before any step."""
    if max_steps < 1:
        raise UsageError(f"--max-steps {max_steps}: give a number of optimizer steps above 0")
    from sickbay import launch, registry
    from sickbay.checklist.conduct import asked
    from sickbay.checklist.result import Checklist
    from sickbay.checklist.training import TOPICS, finding_of
    from sickbay.cli.run import recorded_chart
    from sickbay.core.condition import checkup
    from sickbay.core.settings import Settings
    from sickbay.script import Script
    from sickbay.supervisor import supervise

    began = time.perf_counter()
    script = Script(words[0], tuple(words[1:]))
    script.check()
    with TemporaryDirectory(prefix="sickbay-") as folder:
        rank = launch.Rank()
        ended = supervise(script.command(), script.environment(Settings(out=folder, max_steps=max_steps)))
        chart = recorded_chart(Path(folder), script, rank, ended)
        verdict = checkup(chart, registry.conditions().values())
        if not chart.facts.get("watched", True):
            raise UsageError(f"{words[0]} could not be watched: {(chart.facts.get('problems') or ['no reason is known'])[0]}")
        if not chart.last_step and not verdict.diagnoses:
            how = f"ended with exit code {ended.exit_code}" if ended.exit_code else "ended"
            raise UsageError(f"{words[0]} {how} before its first optimizer step: there is nothing to judge")
        rows = [_row(name, chart, verdict, name in TOPICS) for name in asked(only, skip)]
        findings = tuple(finding_of(diagnosis) for diagnosis in verdict.diagnoses)
        problems = tuple(str(p.get("error", p)) if isinstance(p, dict) else str(p) for p in chart.facts.get("problems") or ())
    return Checklist(
        " ".join(words), tuple(rows), findings, verdict.healthy, dict(verdict.unexamined), problems, time.perf_counter() - began,
        "the script was interrupted" if ended.signal == 2 else "",
    )  # fmt: skip


def _row(name: str, chart: Chart, verdict: Checkup, is_topic: bool) -> Row:
    from sickbay.checklist import training
    from sickbay.checklist.result import Row
    from sickbay.core.diagnosis import number

    found = {id_ for diagnosis in verdict.diagnoses for id_ in (diagnosis.condition, *diagnosis.explains)}
    if is_topic:
        return training.topic_row(name, chart, verdict)
    if name == "training":
        return training.training_row(chart, verdict, 0.0)
    # Row -> the conditions that speak of it, the signal whose first value it shows.
    spoken = {
        "shapes": (("shape-mismatch", "token-id-out-of-range"), "exception"),
        "finite": (tuple(c for c in found | set(verdict.healthy) if _is_of_nan(c)), "nonfinite_step"),
        "gradients": (("missing-gradient", "vanishing-gradients", "exploding-gradients"), "grad_norm"),
        "initial-loss": (("poor-initialization",), "loss"),
        "generation": (("generation-path-mismatch", "repetitive-generation", "incoherent-generation"), "none"),
        "memory": (("out-of-memory", "memory-leak", "evaluation-memory"), "none"),
        "derivative": (("wrong-gradient",), "none"),
        "overfit": (("unlearnable-data",), "none"),
        "settings": (("setting-without-effect",), "none"),
    }.get(name)
    if spoken is None:
        return Row(name, "not examined", _IN_HAND)
    conditions, signal = spoken
    here = tuple(id_ for id_ in conditions if id_ in found)
    values = chart[signal].finite().values if signal in chart.signals() else []
    text = f"{signal.replace('_', ' ')} {number(values[0])} at first" if values else ""
    healthy = [id_ for id_ in conditions if id_ in verdict.healthy]
    if here:
        return Row(name, "found", text, here)
    if healthy:
        return Row(name, "ok", text or f"{', '.join(healthy[:4])} not found")
    return Row(name, "not examined", _IN_HAND)


def _is_of_nan(condition: str) -> bool:
    return condition in (
        "non-finite-input",
        "non-finite-weights",
        "softmax-overflow",
        "division-by-zero",
        "log-of-zero",
        "missing-targets",
        "half-precision-overflow",
    )
