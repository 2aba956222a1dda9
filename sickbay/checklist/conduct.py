"""Asks a target all questions of the checklist, in the order in which one answer makes the next worth asking, and gives the verdicts."""

from __future__ import annotations

import dataclasses
import difflib
import math
import tempfile
import time
from collections.abc import Callable, Sequence
from typing import Any

from torch import nn
from torch.optim import Optimizer

from sickbay import registry
from sickbay.checklist import derivative, look, overfit, pace, training, wiring
from sickbay.checklist.calling import Calling, Convention
from sickbay.checklist.isolation import Isolation
from sickbay.checklist.result import Checklist, Finding, Row
from sickbay.checklist.target import Target, of_parts
from sickbay.core.chart import Chart
from sickbay.core.condition import reachable
from sickbay.core.diagnosis import Checkup
from sickbay.core.errors import UsageError
from sickbay.exams.fork import NoAnswer

SECONDS = 30.0  # at most for one exam
EXAMS = (
    "shapes",
    "finite",
    "gradients",
    "weights",
    "initial-loss",
    "labels",
    "causality",
    "padding",
    "packing",
    "batch-mixing",
    "batches",
    "training",
    "overfit",
    "derivative",
    "settings",
    "generation",
    "memory",
    "throughput",
    "learning-rate",
)
_LOOKED = ("shapes", "finite", "gradients", "weights")
_WATCHED = ("initial-loss", "labels", "causality", "padding", "packing", "batch-mixing", "batches", "training")
_NEED_A_LOSS = ("overfit", "derivative", "throughput", "learning-rate")
_SEVERITIES = ("critical", "warning", "note")
# Findings of the checklist alone, that others explain: nothing else in it is a symptom only.
_SYMPTOMS = ("cannot-overfit", "non-finite-values", "training-fails")

Tell = Callable[[str], None]


def checkup(
    model: nn.Module,
    batches: Any,
    loss_fn: Callable[..., Any] | None = None,
    optimizer: Optimizer | None = None,
    *,
    only: Sequence[str] = (),
    skip: Sequence[str] = (),
    seconds: float = SECONDS,
) -> Checklist:
    """The checklist's verdicts on a model before it is trained; it prints itself, and `verdict` is sick, healthy or unexamined.

    `batches`: an iterable, of which at most 24 are taken (256 MB). `loss_fn`: `(outputs, targets)`, `(model, batch)`, or None for the
    model's own. `only`, `skip`: names of exams; `seconds`: at most for one exam. The model, optimizer and random states are left as found.
    Raises UsageError for what cannot be examined at all.
    """
    target = of_parts(model, batches, loss_fn, optimizer, type(model).__name__)
    return conduct(target, only, skip, seconds)


def asked(only: Sequence[str], skip: Sequence[str]) -> tuple[str, ...]:
    """The exams to make, in order. Raises UsageError for a name that is none."""
    for name in (*only, *skip):
        if name not in EXAMS:
            near = difflib.get_close_matches(name, EXAMS, n=1, cutoff=0.5)
            raise UsageError(f"there is no exam {name!r}: " + (f"did you mean {near[0]}?" if near else f"they are {', '.join(EXAMS)}"))
    return tuple(name for name in EXAMS if (not only or name in only) and name not in skip)


def conduct(
    target: Target,
    only: Sequence[str] = (),
    skip: Sequence[str] = (),
    seconds: float = SECONDS,
    threads: int = 1,
    tell: Tell | None = None,
    keep_interrupted: bool = False,
) -> Checklist:
    """The checklist of `target`. `tell(exam)` is called before each question. `keep_interrupted`: ctrl-C gives what is known so far."""
    if not seconds > 0:
        raise UsageError(f"{seconds} seconds for an exam: it must be more than 0")
    visit = _Visit(target, asked(only, skip), seconds, Isolation(target, threads), tell or (lambda exam: None))
    try:
        visit.run()
    except KeyboardInterrupt:
        if not keep_interrupted:
            raise
        visit.stopped = f"interrupted during {visit.now}"
    finally:
        visit.isolation.close()
    return visit.checklist()


@dataclasses.dataclass
class _Visit:
    """One checkup while it goes on."""

    target: Target
    names: tuple[str, ...]
    seconds: float
    isolation: Isolation
    tell: Tell
    rows: dict[str, Row] = dataclasses.field(default_factory=dict)
    own: list[Finding] = dataclasses.field(default_factory=list)
    watched: Checkup | None = None
    problems: list[str] = dataclasses.field(default_factory=list)
    stopped: str = ""
    now: str = "shapes"
    began: float = dataclasses.field(default_factory=time.perf_counter)

    def run(self) -> None:
        """All rows are there."""
        calling = Calling.of(self.target)
        seen = self._ask("shapes", lambda: look.look(self.target, calling))
        if isinstance(seen, NoAnswer):
            for name in self.names:
                self.rows[name] = Row(name, "not examined", f"the first batch: {seen.reason}")
            return
        if "conventions" in seen:
            calling.conventions = tuple[Convention, ...](seen["conventions"])
        self._looked(seen)
        if any(name in self.names for name in _WATCHED) or "raised" in seen or not math.isfinite(seen.get("loss", math.nan)):
            self._watch(calling, seen)
        reason = _why_not(seen)
        questions: dict[str, tuple[Callable[[], Any], Callable[[Any], tuple[Row, list[Finding]]]]] = {
            "overfit": (
                lambda: overfit.overfit(self.target, calling, self.seconds, self.isolation.terminal),
                lambda answer: overfit.overfit_row(answer, {finding.condition for finding in self._all()}),
            ),
            "derivative": (lambda: derivative.derivative(self.target, calling, self.seconds), derivative.derivative_row),
            "settings": (lambda: wiring.wiring(self.target, calling, self.seconds), wiring.wiring_row),
            "generation": (lambda: pace.generation(self.target, self.seconds), pace.generation_row),
            "memory": (lambda: pace.memory(self.target, calling), pace.memory_row),
            "throughput": (lambda: pace.throughput(self.target, calling, self.seconds / 2), pace.throughput_row),
            "learning-rate": (lambda: pace.rates(self.target, calling, self.seconds), pace.rates_row),
        }
        for name, (question, judge) in questions.items():
            if name not in self.names:
                continue
            if reason and ("raised" in seen or name in (*_NEED_A_LOSS, "memory")):
                self.rows[name] = Row(name, "not examined", reason)
                continue
            began = time.perf_counter()
            answer = self._ask(name, question)
            if isinstance(answer, NoAnswer):
                self.rows[name] = Row(name, "not examined", answer.reason, seconds=time.perf_counter() - began)
                continue
            self._take(judge(answer), time.perf_counter() - began)

    def _ask(self, name: str, question: Callable[[], Any]) -> Any:
        self.now = name
        self.tell(name)
        return self.isolation.ask(question, self.seconds)

    def _take(self, judged: tuple[Row, list[Finding]], seconds: float = 0.0) -> None:
        row, findings = judged
        if row.exam in self.names:
            self.rows[row.exam] = dataclasses.replace(row, seconds=seconds)
        self.own += findings

    def _looked(self, seen: dict[str, Any]) -> None:
        self._take(look.shapes_row(seen), seen["seconds"])
        if "raised" in seen:
            for name in _LOOKED[1:]:
                self.rows[name] = Row(name, "not examined", "the first batch does not get through")
            return
        for judge in (look.finite_row, look.gradients_row, look.weights_row):
            self._take(judge(seen))

    def _watch(self, calling: Calling, seen: dict[str, Any]) -> None:
        began = time.perf_counter()
        with tempfile.TemporaryDirectory(prefix="sickbay-") as folder:
            answer = self._ask("training", lambda: training.train(self.target, calling, folder, self.seconds))
            try:
                chart, verdict = training.verdict(folder, self.target.optimizer is not None)
                chart.signals()
                self._watched_rows(chart, verdict, seen, time.perf_counter() - began)
            except Exception as problem:  # the exams of the model itself can still be made
                reason = answer.reason if isinstance(answer, NoAnswer) else f"{type(problem).__name__}: {problem}"
                self.problems.append(f"the watched steps: {reason}")
                for name in _WATCHED:
                    self.rows[name] = Row(name, "not examined", reason)
                # The condition would have known which of them matter.
                if seen.get("without_gradient") and seen.get("has_graph"):
                    self._take(look.absent_row(seen))

    def _watched_rows(self, chart: Chart, verdict: Checkup, seen: dict[str, Any], seconds: float) -> None:
        self.watched = verdict
        for name in training.TOPICS:
            self.rows[name] = training.topic_row(name, chart, verdict)
        self.rows["batches"] = training.batches_row(self.target, chart, verdict)
        self.rows["training"] = training.training_row(chart, verdict, seconds)
        self._take(training.start_row(self.target, chart, verdict, seen.get("loss", math.nan)))
        self.problems += [str(problem.get("error", problem)) for problem in chart.facts.get("problems") or () if isinstance(problem, dict)]

    def _all(self) -> list[Finding]:
        found = [training.finding_of(diagnosis) for diagnosis in self.watched.diagnoses] if self.watched else []
        return merged(found, self.own)

    def checklist(self) -> Checklist:
        """What is known now."""
        findings = self._all()
        named = {id_ for finding in findings for id_ in (finding.condition, *finding.explains)}
        rows = tuple(self.rows.get(name) or Row(name, "not examined", self.stopped or "it was not reached") for name in self.names)
        healthy = tuple(id_ for id_ in (self.watched.healthy if self.watched else ()) if id_ not in named)
        unexamined = {id_: why for id_, why in (self.watched.unexamined if self.watched else {}).items() if id_ not in named}
        seconds = time.perf_counter() - self.began
        return Checklist(self.target.name, rows, tuple(findings), healthy, unexamined, tuple(self.problems), seconds, self.stopped)


def _why_not(seen: dict[str, Any]) -> str:
    if "raised" in seen:
        return "the first batch does not get through"
    if not math.isfinite(seen["loss"]):
        return "the loss of the first batch is not finite"
    if not seen.get("has_graph", True):
        return "the loss has no graph"
    return ""


def merged(watched: list[Finding], own: list[Finding]) -> list[Finding]:
    """Each fault once, root causes first: what another finding leads to, and mere symptoms where there is a cause, fold beneath it."""
    found = list(watched)
    conditions = registry.conditions()
    for finding in own:
        named = {id_ for known in found for id_ in (known.condition, *known.explains)}
        if finding.condition in named:
            continue
        root = next((known for known in found if finding.condition in reachable(known.condition, conditions)), None)
        if root is None and finding.condition in _SYMPTOMS:
            root = next((known for known in found if known.severity != "note" or finding.severity == "note"), None)
        if root is None:
            found.append(finding)
        else:
            found[found.index(root)] = dataclasses.replace(root, explains=(*root.explains, finding.condition))
    # A symptom found first is folded by the cause that was found after it.
    for symptom in [finding for finding in found if finding.condition in _SYMPTOMS]:
        cause = next((known for known in found if known.condition not in _SYMPTOMS and known.severity != "note"), None)
        if cause is not None:
            found.remove(symptom)
            found[found.index(cause)] = dataclasses.replace(cause, explains=(*cause.explains, symptom.condition))
    return sorted(found, key=lambda finding: _SEVERITIES.index(finding.severity))
