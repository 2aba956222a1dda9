"""The watch over one training run: attaches every probe when torch arrives, and takes everything off again at the end."""

from __future__ import annotations

import contextlib
import importlib
import os
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sickbay import registry
from sickbay.core.chart import Chart
from sickbay.core.condition import checkup
from sickbay.core.diagnosis import Checkup
from sickbay.core.reader import chart_of, load_chart
from sickbay.core.record import RecordWriter
from sickbay.core.settings import Settings, switched_off
from sickbay.core.signals import wanted
from sickbay.report.write import write_report

if TYPE_CHECKING:
    import torch
    from torch import nn

PROBES = (
    "phases",
    "losses",
    "gradients",
    "by_hand",
    "order",
    "updates",
    "parameters",
    "batches",
    "corpus",
    "endings",
    "guessing",
    "pairing",
    "scaling",
    "schedules",
    "exceptions",
    "retention",
    "replicas",
    "checkpoints",
    "batch_sizes",
    "generation",
    "evaluation_memory",
    "vocabulary",
)

# What others build on: the patient's handles, and the steps themselves.
ALWAYS = frozenset(("losses", "gradients", "by_hand", "order", "parameters", "scaling", "exceptions"))


class Watch:
    """One run under observation. `record`: where it is written; `checkup()`: what is found so far."""

    def __init__(self, settings: Settings, rank: int = 0) -> None:
        self.settings = settings
        self.record = RecordWriter(settings.out, rank, settings.max_record_bytes)
        self._loop: Any = None
        self._patient: Any = None
        self._detach: list[Callable[[], None]] = []
        self._began = time.monotonic()
        self._finished = False
        self.record.fact("rank", rank)
        self.record.fact("watched", False)

    def attach(self) -> None:
        """Hook torch, which must be imported. Never raises: what cannot attach is named in the report, and the others go on."""
        try:
            from sickbay.patient import Patient
            from sickbay.probes.loop import Loop

            self._patient = Patient()
            self._loop = Loop(self._patient, self.record, self.settings.max_steps)
            self._began = time.monotonic()
            self._detach.append(self._loop.detach)
            self._loop.attach()
        except Exception as problem:
            self._take_off()
            self._loop = None
            self._say("attach", problem)
            return
        asked = self._asked_for()
        for name in PROBES:
            self._attach_one(f"sickbay.probes.{name}", lambda module: module.attach(self._patient, self.record, self._loop), asked)
        self._attach_one("sickbay.examiner", lambda module: module.attach(self._patient, self.record, self._loop, self.settings.out, asked))
        try:
            self.record.fact("watched", True)
            self._note_machine()
            self.record.flush()
        except Exception as problem:
            self._loop.note_problem("watch", "attach", problem)

    def _asked_for(self) -> frozenset[str] | None:
        """The signals that the chosen conditions read; None for all of them."""
        if not self.settings.select and not self.settings.ignore:
            return None
        chosen = registry.chosen(self.settings.select, self.settings.ignore)
        return frozenset(signal for condition in chosen for signal in (*condition.needs, *condition.uses))

    def _attach_one(self, module_name: str, attach: Callable[[Any], Callable[[], None]], asked: frozenset[str] | None = None) -> None:
        """What measures nothing that was asked for is not attached, and costs nothing."""
        name = module_name.rsplit(".", 1)[-1]
        try:
            module = importlib.import_module(module_name)
            if name in ALWAYS or wanted(module, asked):
                self._detach.append(attach(module))
        except Exception as problem:
            self._loop.note_problem(name, "attach", problem)

    def _say(self, event: str, problem: BaseException) -> None:
        """`problem` of the watch itself is in the report beside those of the loop."""
        before = self._loop.problems if self._loop is not None else []
        own = {"probe": "watch", "event": event, "step": self.record.step, "error": f"{type(problem).__name__}: {problem}"[:300]}
        with contextlib.suppress(Exception):
            self.record.fact("problems", [*before, own])

    def _note_machine(self) -> None:
        torch = sys.modules["torch"]
        self.record.fact("torch", torch.__version__)
        # Asking whether CUDA is available would start it, before the script has chosen its devices.
        self.record.fact("device", "cuda" if torch.cuda.is_initialized() else "cpu")
        self.record.fact("world_size", _number("WORLD_SIZE", 1))

    def given(self, model: nn.Module | None, optimizers: Sequence[torch.optim.Optimizer]) -> None:
        """Make known what the user handed over."""
        if self._loop is None:
            return
        if model is not None:
            with self._loop.sheltered("given"):
                self._patient.roots.add(model)
        for optimizer in optimizers:
            self._loop.emit("optimizer_created", optimizer)

    def finish(self, ended: str = "finished", exception: BaseException | None = None) -> None:
        """Stop watching, whatever state the run is in; the record is complete afterwards. Never raises."""
        if self._finished:
            return
        self._finished = True
        steps = self.record.step
        try:
            if self._loop is not None:
                if isinstance(exception, Exception):
                    self._loop.emit("failed", exception)
                self._loop.emit("finish")
                self.record.fact("overhead", self._overhead())
                self.record.fact("problems", self._loop.problems)
        except Exception as problem:
            self._say("finish", problem)
        finally:
            self._take_off()
            with contextlib.suppress(Exception):
                self._note_machine()
            for key, value in (("steps", steps), ("ended_inside", ended), ("recording", self.record.stopped)):
                with contextlib.suppress(Exception):
                    if value != "":
                        self.record.fact(key, value)
            with contextlib.suppress(Exception):
                self.record.close()

    def _take_off(self) -> None:
        while self._detach:
            with contextlib.suppress(Exception):
                self._detach.pop()()

    def _overhead(self) -> dict[str, Any]:
        elapsed = max(time.monotonic() - self._began, 1e-9)
        share = self._loop.seconds / elapsed
        return {
            "share_of_step_time": round(share, 4),
            "seconds": round(self._loop.seconds, 3),
            "how": "time inside sickbay's own hooks and exams over the time since torch was imported",
        }

    def chart(self) -> Chart:
        """Everything recorded so far; after the end, what the folder holds."""
        return load_chart(self.record.folder) if self._finished and not self.record.stopped else chart_of(self.record)

    def checkup(self) -> Checkup:
        """The verdicts over everything recorded so far."""
        return checkup(self.chart(), registry.chosen(self.settings.select, self.settings.ignore))


def start(settings: Settings, rank: int = 0) -> Watch:
    """A watch over a process that has just imported torch."""
    watch = Watch(settings, rank)
    watch.attach()
    return watch


@contextlib.contextmanager
def watch(
    model: nn.Module | None = None,
    optimizer: torch.optim.Optimizer | Sequence[torch.optim.Optimizer] | None = None,
    *,
    out: str | os.PathLike[str] | None = None,
    select: Sequence[str] = (),
    ignore: Sequence[str] = (),
) -> Iterator[Watch]:
    """Watch the training inside the block; on leaving every hook is gone and the run's folder holds record and report.

    `model`, `optimizer`: only needed when they were made before; others are found by themselves.
    `out`: the run's folder (default `sickbay-runs/<time>`). Raises UsageError for unknown names in `select`/`ignore`.
    """
    import torch  # noqa: F401  (the block trains with it anyway)

    registry.chosen(select, ignore)
    folder = Path(out) if out is not None else Path("sickbay-runs") / time.strftime("%Y%m%d-%H%M%S")
    with contextlib.suppress(OSError):
        folder.mkdir(parents=True, exist_ok=True)
    doctor = Watch(Settings(out=str(folder), select=tuple(select), ignore=tuple(ignore)), _number("RANK", 0))
    if not switched_off():
        doctor.attach()
        doctor.given(model, [] if optimizer is None else list(optimizer) if isinstance(optimizer, Sequence) else [optimizer])
    started = time.time()
    failure: BaseException | None = None
    try:
        yield doctor
    except BaseException as problem:
        failure = problem
        raise
    finally:
        with contextlib.suppress(Exception):
            doctor.record.fact("started", time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime(started)))
            doctor.record.fact("seconds", round(time.time() - started, 3))
            doctor.record.fact("ended", "finished" if failure is None else "failed")
        doctor.finish("finished" if failure is None else "failed", failure)
        _write(doctor, folder)


def _number(variable: str, otherwise: int) -> int:
    """The environment's `variable`, `otherwise` where it is not a number."""
    text = os.environ.get(variable, "")
    return int(text) if text.isdecimal() else otherwise


def _write(doctor: Watch, folder: Path) -> None:
    """Leave the report beside the record; a failure to do so is the report's loss, not the training's."""
    with contextlib.suppress(Exception):
        chart = doctor.chart()
        write_report(folder, chart, checkup(chart, registry.chosen(doctor.settings.select, doctor.settings.ignore)))
