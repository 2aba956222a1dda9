"""Follows a GradScaler: its scale, and the steps it skips."""

from __future__ import annotations

from collections.abc import Callable

from sickbay.core.record import RecordWriter
from sickbay.patient import Patient
from sickbay.probes.loop import Loop

SIGNALS = ("loss_scale", "skipped_step")


class Scaling:
    """Writes the loss scale and whether the step was skipped, for every step that a GradScaler takes."""

    SIGNALS = SIGNALS

    def __init__(self, record: RecordWriter) -> None:
        self.record = record

    def scaler(self, scale: float, skipped: bool) -> None:
        # The step has been closed by now, whether it ran or was left out.
        step = max(0, self.record.step - 1)
        self.record.read("loss_scale", scale, step=step)
        self.record.read("skipped_step", float(skipped), step=step)


def attach(patient: Patient, record: RecordWriter, loop: Loop) -> Callable[[], None]:
    """From now on loss scaling is followed."""
    probe = Scaling(record)
    loop.on("scaler", probe, probe.scaler)
    return lambda: None
