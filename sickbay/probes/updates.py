"""Measures what an optimizer step really did to the weights, on sampled steps: the change's norm, and elements that did not move."""

from __future__ import annotations

import bisect
import itertools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from sickbay.core.record import RecordWriter
from sickbay.patient import Patient, user_line
from sickbay.probes.gradients import parameter_names
from sickbay.probes.loop import Loop
from sickbay.probes.norms import norms_of

SIGNALS = ("update_ratio", "weight_norm", "unmoved_share", "nonfinite_weight")

_EARLY = (0, 1, 2, 4, 8, 16, 32)
_EVERY = 50
_COUNT_ELEMENTS_AT = (1, 2, 8, 100)
_LOW_PRECISION = (torch.bfloat16, torch.float16)  # weights in these are counted at every sampled step: their updates may round to nothing
_MAX_BYTES = 16 << 20  # a copy of weights must stay small beside the run itself; those that do not fit take their turn at later samples
_MAX_COUNTED = 1 << 20  # elements of a tensor, from its beginning, that are counted one by one


class Updates:
    """Keeps a copy of the weights over one optimizer step and writes the measured difference per tensor."""

    SIGNALS = SIGNALS

    def __init__(self, patient: Patient, record: RecordWriter, loop: Loop) -> None:
        self.patient, self.record, self.loop = patient, record, loop
        self._before: list[Tensor] = []
        self._watched: list[tuple[Tensor, float]] = []
        self._checked_start = False
        self._steps: dict[int, int] = {}
        self._turn: dict[int, int] = {}  # of an optimizer: where the next sample begins
        self._moved: dict[int, bool] = {}

    def backward_begin(self, loss: Tensor | None, kind: str) -> None:
        """Once, before anything was learned: weights that are already broken."""
        if self._checked_start or self.record.step > 0:
            return
        self._checked_start = True
        root = self.patient.root
        for name, parameter in root.named_parameters() if root is not None else ():
            if parameter.device.type != "cpu" or not parameter.is_floating_point():
                continue
            count = int((~torch.isfinite(parameter.detach())).sum())
            if count:
                self.record.read("nonfinite_weight", count, where=name, note={"updates_before": 0}, source=user_line(4))

    def step_begin(self, optimizer: Any, late: bool) -> None:
        if not late:
            self._look(optimizer, True)

    def closure_begin(self, optimizer: Any) -> None:
        """The step will make its gradients itself: whatever may get one is copied."""
        self._look(optimizer, False)

    def _look(self, optimizer: Any, have_gradients: bool) -> None:
        """On a sampled step weights about to change are kept, as many as the limit allows, in turn."""
        self._before, self._watched = [], []
        count = self._steps.get(id(optimizer), 0)
        self._steps[id(optimizer)] = count + 1
        if count not in _EARLY and count % _EVERY:
            return
        changing = [
            (parameter, float(rate) if isinstance(rate, (int, float)) else float("nan"))
            for group in optimizer.param_groups
            for rate in (group.get("lr", 0.0),)
            for parameter in group["params"]
            if parameter.is_floating_point() and parameter.nbytes <= _MAX_BYTES
            if parameter.grad is not None or (parameter.requires_grad and not have_gradients)
        ]
        turn = self._turn.get(id(optimizer), 0) % max(1, len(changing))
        waiting = changing[turn:] + changing[:turn]
        used = list(itertools.accumulate(parameter.nbytes for parameter, _ in waiting))
        self._watched = waiting[: bisect.bisect_right(used, _MAX_BYTES)]
        if len(self._watched) < len(changing):
            self._turn[id(optimizer)] = turn + len(self._watched)
        self._before = [parameter.detach().clone() for parameter, _ in self._watched]

    def step_end(self, optimizer: Any) -> None:
        kept = [(watched, before) for watched, before in zip(self._watched, self._before) if watched[0].grad is not None]
        if not kept:
            return
        self._watched, self._before = [watched for watched, _ in kept], [before for _, before in kept]
        after = [parameter.detach() for parameter, _ in self._watched]
        weights = norms_of(self._before, [])
        torch._foreach_sub_(self._before, after)  # in place, since a second copy would cost as much memory again; only sizes are asked
        moved = self._before
        sizes = norms_of(moved, [])
        known = parameter_names(self.patient)
        names = tuple(known.get(id(p), f"{type(optimizer).__name__}.param{i}") for i, (p, _) in enumerate(self._watched))
        self.record.table("weight_norm", names, weights)
        self.record.table("update_ratio", names, [size / weight if weight > 0 else 0.0 for size, weight in zip(sizes, weights)])
        # A step that moves nothing may be one that a wrapper or a loss scaler leaves out; an optimizer that never moved anything is none.
        self._moved[id(optimizer)] = self._moved.get(id(optimizer), False) or any(sizes)
        low = any(parameter.dtype in _LOW_PRECISION for parameter, _ in self._watched)
        if (low or self._steps[id(optimizer)] - 1 in _COUNT_ELEMENTS_AT) and (any(sizes) or not self._moved[id(optimizer)]):
            self._count_unmoved(names, moved, type(optimizer).__module__.startswith("torch.optim."))
        self._before, self._watched = [], []

    def _count_unmoved(self, names: tuple[str, ...], moved: list[Tensor], exact: bool) -> None:
        """An element with a gradient that stays where it was, although one ulp would have been enough to show the step."""
        source = user_line(5)
        for name, (parameter, rate), change in zip(names, self._watched, moved):
            if rate == 0.0 or parameter.grad is None or parameter.grad.layout != torch.strided or change.numel() < 2:
                continue
            gradient, change, weight = (part.detach().reshape(-1)[:_MAX_COUNTED] for part in (parameter.grad, change, parameter))
            asked = (gradient != 0) & torch.isfinite(gradient)
            elements = int(asked.sum())
            if not elements:
                continue
            still = asked & (change == 0)
            unmoved = int(still.sum())
            step = change.abs().max()
            ulp = weight[still].abs() * torch.finfo(weight.dtype).eps
            # Rounding explains a still element when its own plain step, or even the largest step of the tensor, is below one ulp.
            lost = int((((ulp >= step) & (step > 0)) | (ulp >= 2 * rate * gradient[still].abs())).sum()) if unmoved else 0
            note: dict[str, Any] = {"moved": elements - unmoved, "elements": elements, "rounding": lost / unmoved if unmoved else 0.0}
            if weight.dtype in _LOW_PRECISION:
                note |= {"dtype": str(weight.dtype).removeprefix("torch."), "rate": rate, "exact": exact}
            self.record.read("unmoved_share", unmoved / elements, where=name, note=note, source=source)


def attach(patient: Patient, record: RecordWriter, loop: Loop) -> Callable[[], None]:
    """From now on sampled updates are measured."""
    probe = Updates(patient, record, loop)
    for event in ("backward_begin", "closure_begin", "step_begin", "step_end"):
        loop.on(event, probe, getattr(probe, event))
    loop.rests(probe)
    return lambda: None
