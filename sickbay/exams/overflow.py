"""Where gradients leave float16 although no loss scale makes them larger: asked once a GradScaler leaves steps out at a scale of 1."""

from __future__ import annotations

from collections.abc import Callable

from sickbay.core.record import RecordWriter
from sickbay.exams import nonfinite
from sickbay.exams.asking import Asking
from sickbay.exams.fork import NoAnswer
from sickbay.patient import Patient
from sickbay.probes.loop import Loop

SIGNALS = ("first_nonfinite",)

_LARGEST_SCALE = 1.0  # above it the next smaller scale is the cure, and finding it the scaler's own work
_QUESTIONS = 2


class Overflow:
    """Asks at a step left out, while the step's forward is still known, which operation's gradient was the first to overflow."""

    SIGNALS = SIGNALS

    def __init__(self, patient: Patient, record: RecordWriter, asking: Asking) -> None:
        self.patient, self.record, self.asking = patient, record, asking
        self._left = _QUESTIONS

    def left_out(self, scale: float) -> None:
        if scale > _LARGEST_SCALE or not self._left:
            return
        self._left -= 1
        answer = self.asking.ask(lambda: nonfinite.locate_overflow(self.patient, scale))
        if not isinstance(answer, NoAnswer):
            self._left = 0
            self.record.read("first_nonfinite", answer.value, where=answer.where, note=answer.note, source=answer.source)


def attach(patient: Patient, record: RecordWriter, loop: Loop, asking: Asking) -> Callable[[], None]:
    """From now on steps left out at a scale that cannot be the reason are asked about."""
    probe = Overflow(patient, record, asking)
    loop.on("left_out", probe, probe.left_out)
    return lambda: None
