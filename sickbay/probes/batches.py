"""Looks at what goes into the model: fingerprints of the batches, and the mode the model is in when they pass."""

from __future__ import annotations

import weakref
import zlib
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from sickbay.core.record import RecordWriter
from sickbay.patient import ForwardCall, Patient, bare, stochastic_modules, tensors_in
from sickbay.probes.gradients import clean
from sickbay.probes.loop import Loop

SIGNALS = ("batch_repeat", "training_mode", "evaluation_mode")

_SAMPLE = 512  # elements of a tensor that make its fingerprint
_CUT = 4  # a data set is larger than its batch; a batch without its last token, or by halves, is not much smaller than itself
_MAX_KNOWN = 200_000
_ROW = 4  # training steps in a row, each with one pass without gradient


class Batches:
    """Writes how long ago the very same batch was trained on, and in which mode dropout and batch-norm were when it passed."""

    SIGNALS = SIGNALS

    def __init__(self, patient: Patient, record: RecordWriter, loop: Loop) -> None:
        self.patient, self.record = patient, record
        self._seen: dict[int, int] = {}
        self._last_step = -1
        self._last_tensors: list[weakref.ref[Tensor]] = []
        self._stochastic: weakref.WeakKeyDictionary[nn.Module, list[tuple[str, nn.Module]]] = weakref.WeakKeyDictionary()
        self._modes: dict[tuple[int, bool], tuple[float, int, bool]] = {}  # share and repeats, the step that wrote it, that it is a habit
        self._evaluations: dict[int, int] = {}
        self._single: weakref.WeakKeyDictionary[nn.Module, tuple[int, int]] = weakref.WeakKeyDictionary()
        self._trained: weakref.WeakSet[nn.Module] = weakref.WeakSet()

    def forward_end(self, call: ForwardCall, output: Any) -> None:
        if not call.grad_enabled and call.module in self._trained:
            self._mode("evaluation_mode", call)
            self._count_single_passes(call)

    def _count_single_passes(self, call: ForwardCall) -> None:
        """Written once one pass without gradient came before each of several training steps in a row: part of the step, no evaluation."""
        last, row = self._single.get(call.module, (-2, 0))
        step = self.record.step
        row = row + 1 if step == last + 1 else 0
        self._single[call.module] = (step, row)
        if row == _ROW and call.module.training:
            self.record.read("evaluation_mode", 1.0, note={"count": 0, "every_step": True}, source=call.source)

    def backward_begin(self, loss: Tensor | None, kind: str) -> None:
        calls = [call for call in self.patient.training_calls() if not call.spent]
        for call in calls:
            self._trained.add(call.module)
        if not calls or kind == "func":
            return
        self._mode("training_mode", calls[-1])
        self._repeat((calls[0].args, calls[0].kwargs))

    def functional(self, function: Any, args: Any, kwargs: Any) -> None:
        self._repeat((args, kwargs))

    def _repeat(self, batch: Any) -> None:
        mark, tensor = fingerprint(batch)
        if not mark or tensor is None or self._last_step == self.record.step:
            return
        before = self._seen.get(mark)
        # One tensor kept and used again is a choice; an equal one made anew is what a broken loader gives.
        held = [whole for whole in (tensor, self._targets() if tensor.is_floating_point() else None) if whole is not None]
        kept = any(ref() is whole for ref in self._last_tensors for whole in held)
        self._last_step = self.record.step
        self._last_tensors = [weakref.ref(whole) for whole in held]
        note = {"same_object": True} if kept and before is not None else None
        self.record.read("batch_repeat", 0 if before is None else self.record.step - before, note=note)
        if len(self._seen) < _MAX_KNOWN:
            self._seen[mark] = self.record.step

    def _targets(self) -> Tensor | None:
        """The tensor that the newest loss's targets are a part of: where inputs are computed anew, kept targets tell a full-batch run."""
        losses = [call.targets for call in self.patient.losses if call.grad_enabled and not call.spent]
        return _kept(losses[-1]) if losses else None

    def _mode(self, signal: str, call: ForwardCall) -> None:
        parts = self._stochastic.get(call.module)
        if parts is None:
            parts = self._stochastic[call.module] = stochastic_modules(bare(call.module))
        if not parts:
            return
        share = sum(part.training for _, part in parts) / len(parts)
        evaluating = signal == "evaluation_mode"
        repeats = 1
        if evaluating and share > 0:
            mark = fingerprint((call.args, call.kwargs))[0]
            repeats = self._evaluations[mark] = self._evaluations.get(mark, 0) + 1
            if len(self._evaluations) > 64:
                self._evaluations.pop(next(iter(self._evaluations)))
        # Written when it changes, and an evaluation's once more: the second step in which it is so makes a habit of a single look.
        key, mode, step = (id(call.module), evaluating), share + repeats, self.record.step
        before, since, habit = self._modes.get(key, (-1.0, step, False))
        again = mode == before and evaluating and not habit and step > since
        if mode != before or again:
            self._modes[key] = (mode, step, again)
            modules = [clean(name) for name, part in parts if part.training == evaluating][:16]
            note = {"modules": modules, "count": len(parts), "repeats": repeats}
            self.record.read(signal, share, where=modules[0] if modules else "", note=note, source=call.source)


def fingerprint(value: Any) -> tuple[int, Tensor | None]:
    """(checksum, tensor) of the batch's first integer tensors, else of its floats: equal batches have equal checksums, 0 = none."""
    tensors = [tensor for _, tensor in tensors_in(value) if not tensor.requires_grad and tensor.device.type == "cpu" and tensor.numel() > 1]
    whole = [tensor for tensor in tensors if not tensor.is_floating_point() and not tensor.is_complex()]
    chosen = whole or [tensor for tensor in tensors if tensor.is_floating_point()]
    mark, varied = 0, False
    for tensor in chosen[:3]:
        sample = tensor.detach().reshape(-1)[:_SAMPLE].contiguous()
        varied = varied or bool((sample != sample[0]).any())
        mark = zlib.crc32(sample.view(torch.uint8).numpy().tobytes(), mark + tensor.numel())
    return (mark if varied else 0), (_kept(chosen[0]) if chosen else None)


def _kept(tensor: Tensor) -> Tensor:
    """What the script keeps hold of: `tensor`, or the tensor that it is nearly the whole of; a small cut of a data set is made anew."""
    base = tensor._base
    return tensor if base is None or base.numel() > _CUT * tensor.numel() else base


def attach(patient: Patient, record: RecordWriter, loop: Loop) -> Callable[[], None]:
    """From now on batches are fingerprinted and modes compared."""
    probe = Batches(patient, record, loop)
    for event in ("forward_end", "backward_begin", "functional"):
        loop.on(event, probe, getattr(probe, event))
    loop.rests(probe, but=("forward_end",))  # an evaluation may come in any step
    loop.sleeps(probe, through=("forward_end",))
    return lambda: None
