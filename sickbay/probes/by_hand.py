"""Gradients and updates of scripts that step by their own hand: no optimizer tells of them, the loss' graph and the weights do."""

from __future__ import annotations

import math
import weakref
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from sickbay.core.record import RecordWriter
from sickbay.patient import Patient, tensors_in, user_line
from sickbay.probes.gradients import parameter_names
from sickbay.probes.graph import leaves_of
from sickbay.probes.loop import Loop
from sickbay.probes.norms import norms_of

SIGNALS = ("grad_norm", "param_grad_norm", "update_ratio", "weight_norm", "unmoved_share")

_EARLY = (0, 1, 2, 4, 8, 16, 32)
_EVERY = 50
_WAIT = 64  # backward calls that a step may take before the kept weights are given up
_MAX_BYTES = 40 << 20  # a copy of the weights must stay small beside the run itself
_COUNTED = (1, 2, 3)  # sampled steps whose elements are counted one by one; the first may be a warm-up's
_ALL_BUT_FEW = 0.02  # share of elements: a script may mask gradients between its backward and its step, by halves but not by all but few


class ByHand:
    """Keeps a copy of the leaves over sampled steps; where they have moved by the next backward, the script updated them."""

    SIGNALS = SIGNALS

    def __init__(self, patient: Patient, record: RecordWriter, loop: Loop) -> None:
        self.patient, self.record, self.loop = patient, record, loop
        self._leaves: list[weakref.ref[Tensor]] = []
        self._kept: list[Tensor] = []
        self._asked: list[Tensor] = []
        self._sampled = 0
        self._waited = 0
        self._backwards = 0
        self._norms: list[float] = []
        self._names: tuple[str, ...] = ()
        self._source = ""

    def optimizer_created(self, optimizer: Any) -> None:
        """Its own probes measure what it does."""
        self._leaves, self._kept, self._asked, self._norms = [], [], [], []

    def backward_begin(self, loss: Tensor | None, kind: str) -> None:
        if kind != "func" and loss is not None and not self.patient.optimizers:
            self._look(lambda: [leaf for leaf in leaves_of(loss) if leaf.is_floating_point()])

    def backward_end(self, loss: Tensor | None, kind: str) -> None:
        if kind == "func" or not self._leaves or self.patient.optimizers:
            return
        self._source = user_line(4)
        leaves = [leaf for ref in self._leaves if (leaf := ref()) is not None]
        gradients = [leaf.grad for leaf in leaves if leaf.grad is not None and leaf.grad.layout == torch.strided]
        self._norms = norms_of(gradients, []) if len(gradients) == len(self._leaves) else []
        if self._kept and self._sampled - 1 in _COUNTED:
            self._asked = [(part != 0) & torch.isfinite(part) for part in gradients] if self._norms else []

    def functional(self, function: Callable[..., Any], args: Any, kwargs: Any) -> None:
        if args and not self.patient.optimizers:
            self._look(lambda: [tensor for _, tensor in tensors_in(args[0]) if tensor.is_floating_point()])

    def round_end(self, step: int) -> None:
        if self._norms and not self.patient.optimizers:
            total = math.sqrt(sum(norm * norm for norm in self._norms)) if all(map(math.isfinite, self._norms)) else math.nan
            self.record.read("grad_norm", total, source=self._source)
            self.record.table("param_grad_norm", self._names, self._norms)
        self._norms = []

    def _look(self, find: Callable[[], list[Tensor]]) -> None:
        """What moved since the kept copy is written; on a sampled step the weights of now are kept for the next."""
        if self._kept:
            self._compare(find)
        count, self._backwards = self._backwards, self._backwards + 1
        if self._kept or (count not in _EARLY and count % _EVERY):
            return
        leaves = find()
        if not leaves or sum(leaf.nbytes for leaf in leaves) > _MAX_BYTES:
            return
        known = parameter_names(self.patient)
        names = (known.get(id(leaf), f"leaf {i} {list(leaf.shape)}") for i, leaf in enumerate(leaves))
        self._leaves, self._names, self._waited = [weakref.ref(leaf) for leaf in leaves], tuple(names), 0
        self._kept, self._asked = [leaf.detach().clone() for leaf in leaves], []
        self._sampled += 1

    def _compare(self, find: Callable[[], list[Tensor]]) -> None:
        """The same tensors, changed in place, or new ones of the same shapes in the same order."""
        now = [leaf for ref in self._leaves if (leaf := ref()) is not None]
        if len(now) != len(self._kept) or all(torch.equal(a.detach(), b) for a, b in zip(now, self._kept)):
            now = find()
        if [leaf.shape for leaf in now] != [kept.shape for kept in self._kept]:
            self._kept = []
            return
        weights = norms_of(self._kept, [])
        changes = [leaf.detach() - kept for leaf, kept in zip(now, self._kept)]
        sizes = norms_of(changes, [])
        self._waited += 1
        if any(sizes):
            self.record.table("weight_norm", self._names, weights)
            self.record.table("update_ratio", self._names, [size / weight if weight > 0 else 0.0 for size, weight in zip(sizes, weights)])
            self._count_unmoved(changes)
        if any(sizes) or self._waited > _WAIT:
            self._kept = []

    def _count_unmoved(self, changes: list[Tensor]) -> None:
        """Elements that had a gradient and stayed, in tensors of which others moved: what the step leaves alone as a whole is frozen."""
        asked, self._asked = self._asked, []
        for name, change, mask, weight in zip(self._names, changes, asked, self._kept):
            elements, moved = int(mask.sum()), int((mask & (change != 0)).sum())
            if change.numel() < 2 or not moved or _ALL_BUT_FEW < moved / elements < 1 - _ALL_BUT_FEW:
                continue
            # Rounding explains a still element where even the tensor's largest step is below one unit in its last place.
            still = weight[mask & (change == 0)].abs() * torch.finfo(weight.dtype).eps
            lost = int((still >= change.abs().max()).sum())
            note = {"moved": moved, "elements": elements, "rounding": lost / (elements - moved) if elements > moved else 0.0}
            self.record.read("unmoved_share", 1 - moved / elements, where=name, note={**note, "by_hand": True}, source=self._source)


def attach(patient: Patient, record: RecordWriter, loop: Loop) -> Callable[[], None]:
    """From now on gradients and updates are measured where no optimizer makes them."""
    probe = ByHand(patient, record, loop)
    for event in ("optimizer_created", "backward_begin", "backward_end", "functional", "round_end"):
        loop.on(event, probe, getattr(probe, event))
    loop.sleeps(probe)  # an optimizer steps then
    return lambda: None
