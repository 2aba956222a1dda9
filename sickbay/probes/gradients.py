"""Reads loss and gradients at their cheapest moment: one norm per tensor and one host transfer just before the optimizer steps."""

from __future__ import annotations

import math
import weakref
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from sickbay.core.record import RecordWriter
from sickbay.patient import Patient, user_line
from sickbay.probes.loop import Loop
from sickbay.probes.nap import Nap
from sickbay.probes.norms import norms_of

SIGNALS = ("loss", "grad_norm", "param_grad_norm", "clip_norm", "clip_on_scaled", "learning_rate", "nonfinite_step")


class Gradients:
    """Writes loss, learning rate, global and per-tensor gradient norms (before clipping, unscaled) every step."""

    SIGNALS = SIGNALS

    def __init__(self, patient: Patient, record: RecordWriter, loop: Loop) -> None:
        self.patient, self.record, self.loop = patient, record, loop
        self._losses: list[float] = []
        self._loss_line = ""
        self._made_at: weakref.WeakKeyDictionary[Any, str] = weakref.WeakKeyDictionary()
        self._pending: list[Tensor] = []
        self._shrink = 1.0
        self._clipped: float | None = None
        self._names: dict[int, tuple[str, ...]] = {}

    def optimizer_created(self, optimizer: Any) -> None:
        self._made_at[optimizer] = user_line(4)

    def backward_begin(self, loss: Tensor | None, kind: str) -> None:
        if loss is None or loss.numel() != 1:
            return
        if not self.loop.pace.resting:
            self._loss_line = user_line(4)
        if loss.device.type == "cpu":
            self._losses.append(loss.item() / self.patient.scale)
        else:
            self._pending.append(loss.detach() / self.patient.scale)

    def clip(self, total: Any, max_norm: float, parameters: list[Tensor]) -> None:
        norm = float(total) if not isinstance(total, Tensor) or total.device.type == "cpu" else math.nan
        if self.patient.scale != 1.0:
            self.record.read("clip_on_scaled", self.patient.scale, note={"max_norm": max_norm, "norm": norm}, source=user_line(4))
            norm /= self.patient.scale
        self._clipped = norm if self.loop.pace.resting else None
        if math.isfinite(norm) and max_norm > 0:
            if not self.loop.pace.resting:
                self.record.read("clip_norm", norm, note={"max_norm": max_norm})
            if norm > max_norm:
                self._shrink = max_norm / (norm + 1e-6)

    def step_begin(self, optimizer: Any, late: bool) -> None:
        rates = _rates(optimizer)
        if rates:
            self.record.read("learning_rate", max(rates), source=self._made_at.get(optimizer, ""))
        if self._clipped is not None and not self._pending:
            # Between close looks the norm that the script's own clipping found is all that is needed.
            self.patient.norm_at_step = total = self._clipped
            self._clipped, self._shrink = None, 1.0
            self.record.read("grad_norm", total, source=self._loss_line)
            if not math.isfinite(total) and not _left_out(optimizer):
                self.loop.emit("nonfinite", "gradient", None)
            return
        parameters = [p for group in optimizer.param_groups for p in group["params"] if p.grad is not None]
        dense = [p for p in parameters if p.grad is not None and p.grad.layout == torch.strided]
        norms = norms_of([p.grad for p in dense if p.grad is not None], self._pending)
        norms, late_losses = norms[: len(dense)], norms[len(dense) :]
        self._losses.extend(late_losses)
        self._pending.clear()
        self.patient.norm_at_step = math.hypot(*norms)
        if norms:
            scale = self.patient.scale * self._shrink  # fused optimizers unscale inside their step
            shown = [norm / scale for norm in norms]
            total = math.sqrt(sum(norm * norm for norm in shown)) if all(map(math.isfinite, shown)) else math.nan
            self.record.read("grad_norm", total, source=self._loss_line)
            if not self.loop.pace.resting:
                self.record.table("param_grad_norm", self._names_of(optimizer, dense), shown)
            if not math.isfinite(total) and not _left_out(optimizer):
                self.loop.emit("nonfinite", "gradient", None)
        self._shrink = 1.0

    def slept(self, nap: Nap) -> None:
        """All that is known of a step slept through."""
        optimizer = nap.habit.optimizer()
        rates = _rates(optimizer)
        if rates:
            nap.readings.append(("learning_rate", max(rates), self._made_at.get(optimizer, "")))
        self.patient.norm_at_step = nap.norm
        nap.readings += (("grad_norm", nap.norm, self._loss_line), ("loss", sum(nap.losses), self._loss_line))

    def woken(self, nap: Nap) -> None:
        """What such a step had told before something in it was not plain."""
        self._losses.extend(nap.losses)

    def step_end(self, optimizer: Any) -> None:
        self.round_end(self.record.step)

    def round_end(self, step: int) -> None:
        if self._losses:
            self.record.read("loss", sum(self._losses), source=self._loss_line)
            self._losses.clear()
        self._shrink = 1.0

    def _names_of(self, optimizer: Any, parameters: list[Tensor]) -> tuple[str, ...]:
        key = hash((id(optimizer), len(parameters), id(parameters[0]), id(parameters[-1])))
        names = self._names.get(key)
        if names is None or len(names) != len(parameters):
            known = parameter_names(self.patient)
            names = self._names[key] = tuple(known.get(id(p), f"{type(optimizer).__name__}.param{i}") for i, p in enumerate(parameters))
        return names


def _rates(optimizer: Any) -> list[float]:
    return [float(group["lr"]) for group in optimizer.param_groups if isinstance(group.get("lr"), (int, float))]  # Adafactor has None


def _left_out(optimizer: Any) -> bool:
    """True if a GradScaler has told a fused optimizer to leave this step out: its infinities are the scaler's business."""
    found = getattr(optimizer, "found_inf", None)
    return isinstance(found, Tensor) and bool(found.item())


def parameter_names(patient: Patient) -> dict[int, str]:
    """Names by parameter identity, from the outermost modules seen; the wrapper's prefixes are left out."""
    names: dict[int, str] = {}
    for root in sorted(patient.roots, key=lambda module: sum(1 for _ in module.parameters()), reverse=True):
        for name, parameter in named_parameters(root):
            names.setdefault(id(parameter), name)
    return names


def named_parameters(root: nn.Module) -> list[tuple[str, nn.Parameter]]:
    """`root.named_parameters()` without the prefixes that torch.compile and DistributedDataParallel add."""
    return [(clean(name), parameter) for name, parameter in root.named_parameters()]


def clean(name: str) -> str:
    """A parameter or module path as the user wrote the model."""
    return name.replace("_orig_mod.", "").removeprefix("module.")


def attach(patient: Patient, record: RecordWriter, loop: Loop) -> Callable[[], None]:
    """From now on every step's loss and gradient norms are written."""
    probe = Gradients(patient, record, loop)
    for event in ("optimizer_created", "backward_begin", "clip", "step_begin", "step_end", "round_end", "slept", "woken"):
        loop.on(event, probe, getattr(probe, event))
    loop.sleeps(probe)
    return lambda: None
