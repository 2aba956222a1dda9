"""Steps of a plain loop that are slept through: only what would wake us is looked at, and enough is kept to catch up then.

Forward, loss and backward of that loss, once or as often as gradients are accumulated, perhaps a clipping, and the step of the one
optimizer: where the step seen last was of that kind, most of the next ones are told to no probe. Their loss, gradient norm and
learning rate are still written, the first number that is not finite wakes us in its own step, and so does whatever a plain step
does not do.
"""

from __future__ import annotations

import math
import weakref
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor, nn

from sickbay.patient import ForwardCall, Patient, tensors_in
from sickbay.probes.arguments import closure_of
from sickbay.probes.graph import is_scaled
from sickbay.probes.norms import norms_of

AWAKE_EVERY = 8  # steps: this often one that could be slept through is not, for what is counted or sampled over the whole run

_OF_A_BACKWARD = ("backward_asked", "backward_begin", "backward_end", "forward_begin", "forward_end", "loss")
_AT_ITS_END = ("step_begin", "step_end")


class Look(NamedTuple):
    """What of one backward tells whether steps are plain. `rows`: of what the module was called with; lines: of that call and the loss."""

    module: weakref.ref[nn.Module]
    rows: int
    autocast: tuple[str, torch.dtype] | None
    line: str
    loss_line: str


def look(patient: Patient, loss: Any) -> Look | None:
    """At the begin of a backward: the one forward and the one loss before it, where it is of that loss and all that it is of."""
    calls = [call for call in patient.calls if not call.spent]
    losses = [lost for lost in patient.losses if not lost.spent]
    if len(calls) != 1 or len(losses) != 1 or not isinstance(loss, Tensor) or loss.numel() != 1 or loss.device.type != "cpu":
        return None
    call, lost = calls[0], losses[0]
    plain = call.training and call.grad_enabled and lost.grad_enabled and lost.reduction == "mean"
    if not plain or patient.scale != 1.0 or patient.distributed or not is_scaled(loss, lost.nodes[1]):
        return None
    return Look(weakref.ref(call.module), _rows(call.args, call.kwargs), call.autocast, call.source, lost.source)


class Habit:
    """What the run's plain steps have in common; module and optimizer are held weakly. `backwards`: in one step."""

    def __init__(self, looks: list[Look], optimizer: Any) -> None:
        self.module, self.rows, self.autocast, self.line, self.loss_line = looks[0]
        self.optimizer: weakref.ref[Any] = weakref.ref(optimizer)
        self.backwards = len(looks)


def habit_of(events: list[str], looks: list[Look | None], optimizer: Any) -> Habit | None:
    """The habit that a step shows, by its events up to its end and a look at each of its backwards; None if it is not plain."""
    seen = [one for one in looks if one is not None]
    plain = sorted(_OF_A_BACKWARD * len(seen) + _AT_ITS_END)
    if not seen or len(seen) != len(looks) or sorted(event for event in events if event != "clip") != plain or events.count("clip") > 1:
        return None
    return Habit(seen, optimizer) if len({(id(one.module()), one.rows) for one in seen}) == 1 else None


class Nap:
    """One step slept through, and what of it has happened so far; a graph is held between its loss and its backward at most.

    `losses`: what each backward began from, `values`: what the loss function gave, `nodes`: as a LossCall has them. `clipped`: what
    the script's clipping returned, None where it does not clip; `norm`: of the gradients before it. `readings`: (signal, value, the
    user's line), what is written of the step.
    """

    def __init__(self, habit: Habit) -> None:
        self.habit = habit
        self.stage: Literal["idle", "forward", "lost", "backward"] = "idle"
        self.losses: list[float] = []
        self.values: list[float] = []
        self.clipped: Any = None
        self.norm = 0.0
        self.readings: list[tuple[str, float, str]] = []

    # --- is this what a plain step does next? -------------------------------------------------------------------------
    def forward(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
        """A forward of the module, in training mode, on as many rows as ever."""
        habit = self.habit
        if not (self.stage == "idle" or (self.stage == "backward" and len(self.losses) < habit.backwards)):
            return False
        if module is not habit.module() or not module.training or not torch.is_grad_enabled():
            return False
        if _rows(args, kwargs) != habit.rows or torch.is_autocast_enabled("cpu") != (habit.autocast is not None):
            return False
        self._args, self._kwargs, self._rng, self.stage = args, kwargs, torch.default_generator.get_state(), "forward"
        return True

    def lost(self, name: str, value: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
        """Its loss, called as `name(logits, targets, ...)`."""
        if self.stage != "forward" or not args or not torch.is_grad_enabled():
            return False
        logits = args[0]
        if not isinstance(value, Tensor) or not isinstance(logits, Tensor) or value.grad_fn is None or logits.grad_fn is None:
            return False
        self.nodes = logits.grad_fn._sequence_nr(), value.grad_fn._sequence_nr()
        self._name, self._logits, self._value, self._rest = name, logits, value, (args[1:], kwargs)
        self.stage = "lost"
        return True

    def backward(self, loss: Any) -> bool:
        """The backward of that loss or of a multiple of it, which is finite."""
        if self.stage != "lost" or not isinstance(loss, Tensor) or not is_scaled(loss, self.nodes[1]):
            return False
        number = loss.item()
        if not math.isfinite(number):
            return False
        self.losses.append(number)
        self.values.append(number if loss is self._value else self._value.item())
        self._form = self._logits.shape, self._logits.dtype
        del self._logits, self._value  # graph and memory are the script's to free
        self.stage = "backward"
        return True

    def step(self, optimizer: torch.optim.Optimizer, args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
        """The step of the one optimizer, without a closure and by finite gradients."""
        habit = self.habit
        if self.stage != "backward" or len(self.losses) != habit.backwards or optimizer is not habit.optimizer():
            return False
        if closure_of(args, kwargs) is not None:
            return False
        if self.clipped is None:
            gradients = [p.grad for group in optimizer.param_groups for p in group["params"] if p.grad is not None]
            self.norm = math.hypot(*norms_of([gradient for gradient in gradients if gradient.layout == torch.strided], []))
        else:
            self.norm = float(self.clipped)
        return math.isfinite(self.norm)

    # --- catching up ----------------------------------------------------------------------------------------------------
    def call(self) -> ForwardCall | None:
        """The newest forward."""
        module = self.habit.module()
        if self.stage == "idle" or module is None:
            return None
        return ForwardCall(
            module=module,
            args=self._args,
            kwargs=self._kwargs,
            grad_enabled=True,
            training=True,
            rng=self._rng,
            source=self.habit.line,
            autocast=self.habit.autocast,
            finished=True,
            spent=self.stage == "backward",
        )

    def loss(self) -> tuple[str, Tensor, tuple[Any, ...], dict[str, Any]] | None:
        """Name, value, arguments and keywords of the newest loss; of its logits only the form once its backward has begun."""
        if self.stage not in ("lost", "backward"):
            return None
        args, kwargs = self._rest
        if self.stage == "lost":
            return self._name, self._value, (self._logits, *args), kwargs
        shape, dtype = self._form
        return self._name, torch.tensor(self.values[-1]), (torch.empty(shape, dtype=dtype, device="meta"), *args), kwargs


def _rows(args: tuple[Any, ...], kwargs: dict[str, Any]) -> int:
    """The first dimension of the first tensor; 0 where there is none."""
    first = args[0] if args else None
    tensor = first if isinstance(first, Tensor) else next((t for _, t in tensors_in((args, kwargs)) if t.dim()), None)
    shape = tensor.shape if tensor is not None else ()
    return shape[0] if shape else 0
