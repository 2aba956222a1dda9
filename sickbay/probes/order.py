"""The order of calls in the loop: gradients left over, steps without backward, backward without steps, uneven accumulation."""

from __future__ import annotations

import itertools
import math
import weakref
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from sickbay.core.record import RecordWriter
from sickbay.patient import Patient, user_line
from sickbay.probes.graph import leaves_of
from sickbay.probes.loop import Loop
from sickbay.probes.norms import norms_of

SIGNALS = ("backwards_since_step", "backwards_without_step", "carried_gradient", "dropped_backwards", "loss_weight_sum")

_LOOK_EVERY = 50
_FIRST_STEPS = 4
_MEASURED = 1 << 16  # elements of a leaf whose norm tells whether it was moved: an update may reach but one of them
_SAME = 0.01  # a division leaves the norm's share to rounding


@dataclass
class Held:
    """What is remembered of one optimizer between its steps, also when the optimizer itself is gone.

    `name`: no other optimizer's. `added`: those of its `backwards` that add to gradients themselves. `carried`: share of old gradient
    found, None until looked; `reached`: some backward gave its parameters a gradient. `parameters`: their ids; `versions`: the sum of how
    often they were written, when they first had a gradient; `moved`: somebody has written to them since. `norm_before`: their own norm
    when last looked at, and `by_hand` how often it was another one; `replaced`: losses now reach new tensors in their stead.
    """

    name: str = ""
    kind: str = ""
    steps: int = 0
    backwards: int = 0
    added: int = 0
    all_backwards: int = 0
    reached: bool = False
    norm: float = 0.0
    carried: float | None = None
    cleaned: bool = False
    finite: bool = True
    sources: list[str] = field(default_factory=list)
    parameters: frozenset[int] = frozenset()
    versions: int = 0
    moved: bool = False
    norm_before: float = math.nan
    by_hand: int = 0
    replaced: bool = False


@dataclass
class MicroBatch:
    """One backward of a step: `given` to backward, the loss function's own `mean`, and how many targets it `counted`.

    `asked`: line, name and number of classes of the loss. `targets`: where the targets lie in memory, which two batches never share
    while one is kept.
    """

    given: float
    mean: float
    counted: int
    asked: str = ""
    targets: int = 0


class Order:
    """Follows each optimizer's parameters from step to step; where there is no optimizer, the leaves of the loss' graph."""

    SIGNALS = SIGNALS

    def __init__(self, patient: Patient, record: RecordWriter, loop: Loop) -> None:
        self.patient, self.record, self.loop = patient, record, loop
        self._held: weakref.WeakKeyDictionary[Any, Held] = weakref.WeakKeyDictionary()
        self._everyone: list[Held] = []
        self._skips = 0
        self._by_hand = Held()
        self._leaves: list[weakref.ref[Tensor]] = []
        self._shapes: list[torch.Size] = []
        self._rebinds = False
        self._print: tuple[float, ...] = ()
        self._micro: list[MicroBatch] = []
        self._accumulates = False
        self._norms_after_backward: dict[int, float] = {}
        self._divided_before_clip = 0.0
        self._divided_by_hand = 1.0
        self._left_between: list[float] = []
        self._clipped = False
        self._kept: list[float] = []
        self._weighted_steps = 0
        self._backwards = 0
        self._torch_steps = 0
        self._func_calls = 0

    # --- backward -----------------------------------------------------------------------------------------------
    def backward_begin(self, loss: Tensor | None, kind: str) -> None:
        self._backwards += 1
        if not self._torch_steps:
            self._look_for_hand_written_steps(loss, kind)
        finite = loss is None or loss.numel() != 1 or loss.device.type != "cpu" or math.isfinite(loss.item())
        for optimizer, held in tuple(self._held.items()):
            if kind != "grad":  # torch.autograd.grad adds to no gradient: what it gives, the script puts there itself
                self._look_for_leftovers(optimizer, held, loss)
            held.finite = held.finite and finite
        self._note_what_is_left()
        self._note_micro_batch(loss)

    def _look_for_leftovers(self, optimizer: Any, held: Held, loss: Tensor | None) -> None:
        """Between two steps the old gradients must have disappeared at the start of at least one backward."""
        gradients = [p.grad for group in optimizer.param_groups for p in group["params"] if p.grad is not None and not p.grad.is_sparse]
        looking = held.steps < _FIRST_STEPS or held.steps % _LOOK_EVERY == 0
        if gradients and (held.cleaned or not looking):
            return
        if gradients and loss is not None and loss.grad_fn is not None and not _reaches(loss, optimizer):
            held.cleaned = True  # copies of the weights, whose gradients the script puts there itself, anew for each step
            return
        left = math.hypot(*norms_of(gradients, [])) if gradients else 0.0
        if left == 0.0:
            if held.added and held.steps and len(self._held) == 1:
                note = {"finite_loss": held.finite}
                self.record.read("dropped_backwards", held.added, where=held.name, note=note, source=held.sources[-1])
            held.backwards, held.added, held.cleaned, held.finite = 0, 0, True, True
        elif held.steps and held.carried is None:
            held.carried = left / held.norm if held.norm > 0 else math.inf

    def backward_end(self, loss: Tensor | None, kind: str) -> None:
        if kind == "func":
            self._func_calls += 1
            self.loop.end_step(by_hand=True)
            return
        line = user_line(4)
        for optimizer, held in tuple(self._held.items()):
            held.backwards += 1
            held.added += kind != "grad"
            held.all_backwards += 1
            if not held.reached and _has_gradient(optimizer):
                held.reached, held.parameters, held.versions = True, *_written(optimizer)
                held.norm_before = _own_norm(optimizer)
            elif not held.steps and _looked_at(held.all_backwards):
                held.moved = held.moved or _written(optimizer)[1] != held.versions
                norm = _own_norm(optimizer)
                held.by_hand, held.norm_before = held.by_hand + (norm != held.norm_before and math.isfinite(norm)), norm
            held.sources = [*held.sources[-3:], line]
        self._by_hand.backwards += 1
        self._by_hand.sources = [line]
        if self._accumulates and self._weighted_steps < _FIRST_STEPS:
            held_now = [parameter for optimizer in self._held for parameter in _with_gradient(optimizer)]
            norms = norms_of([parameter.grad for parameter in held_now if parameter.grad is not None], [])
            self._norms_after_backward = {id(p): norm / self.patient.scale for p, norm in zip(held_now, norms)}
        self._clipped = False

    # --- steps --------------------------------------------------------------------------------------------------
    def optimizer_created(self, optimizer: Any) -> None:
        self._of(optimizer)

    def _of(self, optimizer: Any) -> Held:
        held = self._held.get(optimizer)
        if held is None:
            kind = type(optimizer).__name__
            alike = sum(other.kind == kind for other in self._everyone)
            held = self._held[optimizer] = Held(f"{kind} {alike + 1}" if alike else kind, kind)
            self._everyone.append(held)
        return held

    def step_begin(self, optimizer: Any, late: bool) -> None:
        held = self._of(optimizer)
        if len(held.parameters) != sum(len(group["params"]) for group in optimizer.param_groups):
            held.parameters, _ = _written(optimizer)
        norm = self.patient.norm_at_step
        backwards = held.backwards
        if backwards == 0 and norm > 0 and norm != held.norm:
            backwards = 1  # the script fills .grad by its own hand
        if held.steps < _LOOK_EVERY or backwards == 0:
            self.record.read("backwards_since_step", backwards, where=held.name, source=user_line(4))
        if held.steps and backwards and (held.carried is not None or held.cleaned):
            value = 0.0 if held.cleaned else held.carried or 0.0
            if value or held.steps < _FIRST_STEPS + 4:
                source = held.sources[-1] if held.sources else ""
                self.record.read("carried_gradient", value, where=held.name, note={"norm_at_step": held.norm}, source=source)
        held.norm = norm

    def step_end(self, optimizer: Any) -> None:
        held = self._of(optimizer)
        held.steps += 1
        held.backwards, held.added, held.carried, held.cleaned, held.finite = 0, 0, None, False, True
        self._torch_steps += 1
        self._write_weighting(optimizer)

    def clip(self, total: Any, max_norm: float, parameters: list[Tensor]) -> None:
        before = self._norm_after_backward(parameters)
        self._clipped = True
        if before and math.isfinite(float(total)) and float(total) > max_norm:
            self._divided_before_clip = float(total) / self.patient.scale / before

    def scaler(self, scale: float, skipped: bool) -> None:
        self._skips += skipped
        if skipped:
            for held in self._held.values():
                held.backwards, held.added, held.carried, held.cleaned = 0, 0, None, False
            self._micro.clear()
            self._kept.clear()

    # --- accumulation -------------------------------------------------------------------------------------------
    def _note_what_is_left(self) -> None:
        """Between two backwards of a step: the share of the gradients' norm that the script has left of what was accumulated."""
        if not (self._micro and self._norms_after_backward):
            return
        held = [parameter for optimizer in self._held for parameter in _with_gradient(optimizer)]
        norms = norms_of([parameter.grad for parameter in held if parameter.grad is not None], [])
        # Another network's gradients may have been zeroed meanwhile.
        before = self._norm_after_backward([parameter for parameter, norm in zip(held, norms) if norm > 0])
        now = math.hypot(*norms) / self.patient.scale
        # A clip between them shrinks by what it meets; only what the script multiplies by its own hand is a weight.
        self._kept.append(now / before if before and not self._clipped else math.nan)

    def _note_micro_batch(self, loss: Tensor | None) -> None:
        losses = [call for call in self.patient.losses if call.grad_enabled and not call.spent]
        fresh = any(not call.spent for call in self.patient.training_calls())
        if loss is None or loss.device.type != "cpu" or len(losses) != 1 or not fresh:
            self._micro.append(MicroBatch(math.nan, math.nan, 0))
            return
        call = losses[-1]
        counted = call.targets.numel()
        if call.by_class and (self._accumulates or self._micro):
            counted = int((call.targets != call.ignore_index).sum())
        mean = call.value.item() if call.value.numel() == 1 else math.nan
        if call.reduction == "sum" and counted:
            mean /= counted
        given = loss.item() / self.patient.scale if loss.numel() == 1 else math.nan
        asked = f"{call.source} {call.name}"
        if call.classifies and call.logits.dim() > 1:
            asked += f" of {call.logits.shape[1]}"
        self._micro.append(MicroBatch(given, mean, counted, asked, call.targets.data_ptr()))

    def _norm_after_backward(self, parameters: list[Tensor]) -> float:
        """The gradients' norm over `parameters` as the last backward left them; 0 where it was not taken."""
        return math.hypot(*(self._norms_after_backward.get(id(parameter), 0.0) for parameter in parameters))

    def _write_weighting(self, optimizer: Any) -> None:
        if not self._micro:
            return  # written when another optimizer made its step with the same gradients
        before, after = self._norm_after_backward(_with_gradient(optimizer)), self._divided_before_clip
        self._norms_after_backward, self._divided_before_clip = {}, 0.0
        micro, self._micro = self._micro, []
        kept, self._kept = self._kept, []
        was_accumulating, self._accumulates = self._accumulates, len(micro) > 1
        if len(micro) < 2 or not was_accumulating or not all(math.isfinite(m.given) and m.mean > 0 and m.counted for m in micro):
            return
        if not _parts_of_one_batch(micro):
            return
        # Gradients that the script divides by its own hand before the step were weighted there.
        if before:
            self._divided_by_hand = after or self.patient.norm_at_step / before
        self._weighted_steps += 1
        if kept:
            known = len(kept) == len(micro) - 1 and all(share > 0 for share in kept)
            self._left_between = kept if known else []
        between = self._left_between if len(self._left_between) == len(micro) - 1 else []
        left = [math.prod(between[number:]) for number in range(len(micro))]
        weights = [m.given / m.mean * self._divided_by_hand * share for m, share in zip(micro, left)]
        total, tokens = sum(weights), sum(m.counted for m in micro)
        worst = max(abs(w / total * tokens / m.counted - 1) for w, m in zip(weights, micro)) if total else math.inf
        note = {"count": len(micro), "weights": weights[:64], "tokens": [m.counted for m in micro][:64], "worst": worst}
        if between and all(abs(share * len(micro) - 1) < _SAME for share in between):
            note["divided_between"] = True
        held = max(self._everyone, key=lambda h: h.steps, default=self._by_hand)
        self.record.read("loss_weight_sum", total, note=note, source=held.sources[-1] if held.sources else "")

    # --- updates written by hand ----------------------------------------------------------------------------------
    def _look_for_hand_written_steps(self, loss: Tensor | None, kind: str) -> None:
        """No torch optimizer steps: leaves of the loss' graph whose values moved since the last backward were updated by the script.

        It may have changed them in place, or put new ones in their stead.
        """
        leaves = [leaf for ref in self._leaves if (leaf := ref()) is not None]
        lost = len(leaves) < len(self._leaves)
        if loss is not None and (lost or self._rebinds or _looked_at(self._backwards)):
            reached = leaves_of(loss)
            if self._put_in_their_stead(leaves, reached) or lost or self._backwards <= 2:
                leaves, self._shapes = reached, [leaf.shape for leaf in reached]
                self._leaves = [weakref.ref(leaf) for leaf in leaves]
        parts = [leaf.detach().reshape(-1)[:_MEASURED] for leaf in leaves[:8] if leaf.is_floating_point() and leaf.numel()]
        now = tuple(float(value) for part in parts for value in (part[0], torch.linalg.vector_norm(part, dtype=torch.float64)))
        if self._print and now and now != self._print:
            held = self._by_hand
            gradients = [leaf.grad for leaf in leaves if leaf.grad is not None]
            left = math.hypot(*norms_of(gradients, [])) if gradients else 0.0
            source = held.sources[-1] if held.sources else ""
            if kind != "grad" or not left:
                self.record.read("carried_gradient", 1.0 if left else 0.0, where="update written by hand", source=source)
            held.steps += 1
            self.loop.end_step(by_hand=True)
        self._print = now

    def _put_in_their_stead(self, before: list[Tensor], now: list[Tensor]) -> bool:
        """True if `now` has new tensors, shape for shape, where an optimizer's parameters were: the script gives each step new weights."""
        if [leaf.shape for leaf in now] != self._shapes:
            return self._rebinds
        known, present = {id(leaf) for leaf in before}, {id(leaf) for leaf in now}
        for held in self._held.values():
            if held.parameters & present:
                held.replaced = False
            elif held.parameters & known:
                held.replaced = self._rebinds = True
        return self._rebinds

    def finish(self) -> None:
        """The run is over: whoever got gradients but never stepped is written down, unless the script moved the weights by its own hand."""
        for held in self._everyone:
            if not self._torch_steps and (held.by_hand > 1 or (held.replaced and self._by_hand.steps > 1)):
                continue
            if not held.steps and held.all_backwards >= 2 and held.reached:
                alone = not held.moved and not any(held.parameters & other.parameters for other in self._everyone if other.steps)
                note = {"optimizers": len(self._everyone), "scaler_skips": self._skips, "alone": alone}
                self.record.read("backwards_without_step", held.all_backwards, where=held.name, note=note, source=held.sources[-1])


def _with_gradient(optimizer: Any) -> list[Tensor]:
    """The optimizer's parameters that hold a dense gradient."""
    held = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    return [parameter for parameter in held if parameter.grad is not None and not parameter.grad.is_sparse]


def _parts_of_one_batch(micro: list[MicroBatch]) -> bool:
    """False where the backwards of a step ask different things (several tasks' losses) or the same batch again (adversarial steps)."""
    repeated = any(before.targets == after.targets for before, after in itertools.pairwise(micro))
    return len({m.asked for m in micro}) == 1 and not repeated


def _reaches(loss: Tensor, optimizer: Any) -> bool:
    """True if `loss.backward()` would add to the gradient of any of the optimizer's parameters."""
    held = {id(parameter) for group in optimizer.param_groups for parameter in group["params"]}
    return any(id(leaf) in held for leaf in leaves_of(loss))


def _written(optimizer: Any) -> tuple[frozenset[int], int]:
    """The ids of the optimizer's parameters, and how often they were written in place altogether."""
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    return frozenset(map(id, parameters)), sum(parameter._version for parameter in parameters)


def _looked_at(backwards: int) -> bool:
    """True for the backwards at which what costs more is asked: the first ones, each power of two, and every 50th."""
    return backwards < 2 * _FIRST_STEPS or backwards % _LOOK_EVERY == 0 or backwards & (backwards - 1) == 0


def _own_norm(optimizer: Any) -> float:
    """The norm of all the optimizer's dense parameters together; not finite once one of them is not."""
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    return math.hypot(*norms_of([p.detach() for p in parameters if p.is_floating_point() and p.layout == torch.strided], []))


def _has_gradient(optimizer: Any) -> bool:
    """True if any of the optimizer's parameters holds a gradient."""
    return any(parameter.grad is not None for group in optimizer.param_groups for parameter in group["params"])


def attach(patient: Patient, record: RecordWriter, loop: Loop) -> Callable[[], None]:
    """From now on the order of calls is followed; the returned function writes what only the end can tell."""
    probe = Order(patient, record, loop)
    for event in ("backward_begin", "backward_end", "optimizer_created", "clip", "step_begin", "step_end", "scaler"):
        loop.on(event, probe, getattr(probe, event))
    loop.on("finish", probe, probe.finish)
    loop.rests(probe)
    return lambda: None
