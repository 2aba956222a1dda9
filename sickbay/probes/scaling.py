"""Follows a GradScaler: its scale, and the steps it leaves out."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch.amp.grad_scaler import GradScaler

from sickbay.core.record import RecordWriter
from sickbay.patient import Patient
from sickbay.probes.loop import Loop
from sickbay.probes.unseen import unseen

SIGNALS = ("loss_scale", "skipped_step")


class Scaling:
    """Writes the loss scale and whether the step was left out, for every step that a GradScaler takes; keeps `patient.scale` true."""

    SIGNALS = SIGNALS

    def __init__(self, patient: Patient, record: RecordWriter, loop: Loop) -> None:
        self.patient, self.record, self.loop = patient, record, loop

    def scaler(self, scale: float, skipped: bool) -> None:
        # The step has been closed by now, whether it ran or was left out.
        step = max(0, self.record.step - 1)
        self.record.read("loss_scale", scale, step=step)
        self.record.read("skipped_step", float(skipped), step=step)

    def around_scale(self, original: Any) -> Any:
        @unseen
        def scale(scaler: Any, outputs: Any) -> Any:
            result = original(scaler, outputs)
            if self.loop.awake() and scaler.is_enabled():
                with self.loop.sheltered("scale"):
                    self.patient.scale = float(scaler.get_scale())
            return result

        return scale

    def around_unscale(self, original: Any) -> Any:
        @unseen
        def unscale_(scaler: Any, optimizer: Any) -> Any:
            result = original(scaler, optimizer)
            if self.loop.awake():
                self.patient.scale = 1.0
                self.loop.emit("unscaled")
            return result

        return unscale_

    def around_step(self, original: Any) -> Any:
        @unseen
        def step(scaler: Any, optimizer: Any, *args: Any, **kwargs: Any) -> Any:
            if not self.loop.awake() or not scaler.is_enabled():
                return original(scaler, optimizer, *args, **kwargs)
            before = self.loop.steps_taken()
            result = original(scaler, optimizer, *args, **kwargs)
            with self.loop.sheltered("scaler"):
                if before == self.loop.steps_taken():
                    self.loop.emit("left_out", float(scaler.get_scale()))
                    self.loop.end_step()  # the optimizer was not called: a step that the scaler left out
            return result

        return step

    def around_update(self, original: Any) -> Any:
        @unseen
        def update(scaler: Any, *args: Any, **kwargs: Any) -> Any:
            if not self.loop.awake() or not scaler.is_enabled():
                return original(scaler, *args, **kwargs)
            before = float(scaler.get_scale())
            result = original(scaler, *args, **kwargs)
            with self.loop.sheltered("scaler"):
                after = float(scaler.get_scale())
                self.patient.scale = 1.0
                # The scale backs off after exactly those steps that were left out, also where a fused optimizer leaves them out itself.
                self.loop.emit("scaler", after, after < before and not args and not kwargs)
            return result

        return update


def attach(patient: Patient, record: RecordWriter, loop: Loop) -> Callable[[], None]:
    """From now on loss scaling is followed, until the loop detaches."""
    probe = Scaling(patient, record, loop)
    loop.replace(GradScaler, "scale", probe.around_scale)
    loop.replace(GradScaler, "unscale_", probe.around_unscale)
    loop.replace(GradScaler, "step", probe.around_step)
    loop.replace(GradScaler, "update", probe.around_update)
    loop.on("scaler", probe, probe.scaler)
    return lambda: None
