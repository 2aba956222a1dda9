"""Operands of a loss that hold one number per sample each, but broadcast against each other: every prediction meets every target.

Between model and loss the operands are seen as they meet, in a run's first steps. Where the script computes its loss inside the
model's forward, the graph shows whether something grew on its way to the loss; only then is the forward run again, on a copy.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

from sickbay.core.record import RecordWriter
from sickbay.exams import fork
from sickbay.exams.asking import Asking
from sickbay.patient import ForwardCall, LossCall, Patient, autocast_of, bare, tensors_in, user_line
from sickbay.probes.loop import Loop

SIGNALS = ("paired_broadcast",)

_STEPS = 2  # in which the loss is followed back
_NODES = 96  # of the graph nearest to the loss
_REGRESSING = ("mse_loss", "l1_loss", "smooth_l1_loss", "huber_loss")
_PAIRING = frozenset(("sub", "rsub", "subtract", "mul", "rmul", "multiply", "div", "truediv", "rtruediv", "true_divide"))
# What a loss may do to numbers one by one before it sums or averages them; anything else may have a use for pairs.
_ARITHMETIC = ("Add", "Sub", "Rsub", "Mul", "Div", "Neg", "Abs", "Pow", "Sqrt", "Log", "Log1P", "Sum", "Mean")
_BOUNDING = ("Clamp", "ClampMin", "ClampMax", "Minimum", "Maximum", "Where", "Relu", "Tanh", "Sigmoid", "LogSigmoid", "Softplus")
_LOSSES = ("HuberLoss", "SmoothL1Loss", "MseLoss", "L1Loss")
_VIEWS = ("ToCopy", "Squeeze", "Unsqueeze", "View", "UnsafeView", "Reshape", "ReshapeAlias", "Expand", "Clone", "Alias")
_ONE_BY_ONE = frozenset((*_ARITHMETIC, *_BOUNDING, *_LOSSES, *_VIEWS))
_MADE_ON_PURPOSE = ("UnsqueezeBackward0", "PermuteBackward0", "TransposeBackward0", "TBackward0", "ViewBackward0", "ReshapeAliasBackward0")
_TIMEOUT = 20.0


@dataclass
class Pairing:
    """One operation whose operands have the same elements one for one but for a stray dimension. `node`: its autograd node's number."""

    node: int
    function: str
    shapes: list[list[int]]
    result: list[int]
    predictions: int
    source: str

    @property
    def growth(self) -> float:
        return math.prod(self.result) / max(math.prod(shape) for shape in self.shapes)


class Broadcasts:
    """Writes the pairings that nothing but an elementwise function and a sum or mean separates from the loss."""

    SIGNALS = SIGNALS

    def __init__(self, patient: Patient, record: RecordWriter, loop: Loop, asking: Asking) -> None:
        self.patient, self.record, self.asking = patient, record, asking
        self._seen: list[Pairing] = []
        self._on_purpose = False
        self._written: set[str] = set()
        self._replayed = False

    def outgrown(self, function: Any, args: Any, result: Tensor, start: int) -> None:
        if len(self._seen) < 16:
            found = pairing(function, args, result, start)
            self._on_purpose = self._on_purpose or found == "on purpose"
            if isinstance(found, Pairing):
                self._seen.append(found)

    def loss(self, call: LossCall) -> None:
        if call.name in _REGRESSING and call.grad_enabled and call.nodes[1] >= 0 and call.logits.shape != call.targets.shape:
            shapes = [list(call.logits.shape), list(call.targets.shape)]
            if pairs(*shapes) and len(shapes[0]) != len(shapes[1]):
                result = list(torch.broadcast_shapes(*shapes))
                self._seen.append(Pairing(call.nodes[1], call.name, shapes, result, int(call.nodes[0] < 0), call.source))

    def backward_begin(self, loss: Tensor | None, kind: str) -> None:
        if loss is None or kind == "func" or loss.numel() != 1 or loss.grad_fn is None:
            return
        if self._seen or self.record.step < _STEPS:
            nodes = summed(loss)
            numbers = {int(node._sequence_nr()) for node in nodes}
            for found in self._seen:
                if found.node in numbers and not self._on_purpose:
                    self._write(found)
            if not self._seen and not self._replayed and any(_grows(node) for node in nodes):
                self._replay()
        self._seen.clear()

    def round_end(self, step: int) -> None:
        self._seen.clear()
        self._on_purpose = False

    def _replay(self) -> None:
        calls = [call for call in self.patient.training_calls() if not call.spent]
        if calls:
            self._replayed = True
            answer = self.asking.ask(lambda: fork.ask(lambda: replay(calls[-1]), _TIMEOUT))
            if isinstance(answer, dict):
                self._write(Pairing(**answer))

    def _write(self, found: Pairing) -> None:
        if found.source not in self._written and len(self._written) < 8:
            self._written.add(found.source)
            roles = ["prediction", "target"] if found.predictions == 0 else ["target", "prediction"]
            note = {"function": found.function, "shapes": found.shapes, "result": found.result, "roles": roles}
            self.record.read("paired_broadcast", found.growth, where=found.function, note=note, source=found.source)


class Pairings(TorchFunctionMode):
    """Keeps the pairings of a forward that runs again in a forked copy."""

    def __init__(self) -> None:
        super().__init__()
        self.found: list[Pairing] = []
        self.on_purpose = False

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if len(args) == 2 and isinstance(args[0], Tensor) and isinstance(args[1], Tensor) and isinstance(result, Tensor):
            found = pairing(func, args, result, 0)
            self.on_purpose = self.on_purpose or found == "on purpose"
            if isinstance(found, Pairing):
                self.found.append(found)
        return result


def replay(call: ForwardCall) -> dict[str, Any] | None:
    """The first pairing that the loss of this forward sums up, as a dict; None if there is none. To be called in a forked copy only."""
    torch.set_rng_state(call.rng)
    with torch.enable_grad(), autocast_of(call), Pairings() as mode:
        output = bare(call.module)(*call.args, **call.kwargs)
    losses = [tensor for _, tensor in tensors_in(output) if tensor.numel() == 1 and tensor.grad_fn is not None]
    numbers = {int(node._sequence_nr()) for loss in losses for node in summed(loss)}
    return next((asdict(found) for found in mode.found if found.node in numbers and not mode.on_purpose), None)


def pairs(left: list[int], right: list[int]) -> bool:
    """True if both shapes are the same but for dimensions of size 1, and broadcasting makes something larger than either."""
    if [size for size in left if size != 1] != [size for size in right if size != 1] or left == right:
        return False
    try:
        return bool(math.prod(torch.broadcast_shapes(left, right)) > math.prod(left))
    except RuntimeError:
        return False


def pairing(function: Any, args: Any, result: Tensor, start: int) -> Pairing | str | None:
    """The pairing that this call is; "on purpose" where the script itself arranged operands to meet in pairs; None if it is no pairing.

    One operand must be a prediction (it has a graph) and the other a target. `start`: autograd's number when the stretch began.
    """
    name = str(getattr(function, "__name__", "")).strip("_")
    if name not in _PAIRING or result.grad_fn is None or not pairs(list(args[0].shape), list(args[1].shape)):
        return None
    left, right = args
    if left.requires_grad == right.requires_grad or left.untyped_storage().data_ptr() == right.untyped_storage().data_ptr():
        return "on purpose"
    prediction, target = (left, right) if left.requires_grad else (right, left)
    node = prediction.grad_fn
    arranged = node is not None and node._sequence_nr() >= start and node.name() == _MADE_ON_PURPOSE[0]
    if prediction.dim() == target.dim():
        # (N, 1) against (1, N): only where neither was turned by the script is it a slip.
        arranged = arranged or (node is not None and node.name() in _MADE_ON_PURPOSE) or target._base is not None
    if arranged:
        return "on purpose"
    shapes, predictions = [list(left.shape), list(right.shape)], 0 if left.requires_grad else 1
    return Pairing(int(result.grad_fn._sequence_nr()), name, shapes, list(result.shape), predictions, user_line(3))


def summed(loss: Tensor) -> list[Any]:
    """The nodes that lie between `loss` and its terms: elementwise functions, sums and means, as far back as there is nothing else."""
    found: list[Any] = []
    queue, seen = [loss.grad_fn], {loss.grad_fn}
    while queue and len(found) < _NODES:
        node: Any = queue.pop(0)
        found.append(node)
        if node.name().partition("Backward")[0] in _ONE_BY_ONE:
            for child, _ in node.next_functions:
                if child is not None and child not in seen:
                    seen.add(child)
                    queue.append(child)
    return found


def _grows(node: Any) -> bool:
    """True if `node` made (..., N, N) out of an operand of N elements a row."""
    if node.name().partition("Backward")[0] not in ("Sub", "Mul", "Div", "Add", "Rsub", "Expand"):
        return False
    made = list(node._input_metadata[0].shape)
    if len(made) < 2 or made[-1] != made[-2] or made[-1] < 2:
        return False
    given = [list(child._input_metadata[index].shape) for child, index in node.next_functions if child is not None]
    return any(math.prod(shape) * made[-1] == math.prod(made) for shape in given)


def attach(patient: Patient, record: RecordWriter, loop: Loop, asking: Asking) -> Callable[[], None]:
    """From now on losses are followed back to operands that broadcast."""
    probe = Broadcasts(patient, record, loop, asking)
    for event in ("outgrown", "loss", "backward_begin", "round_end"):
        loop.on(event, probe, getattr(probe, event))
    loop.rests(probe)
    return lambda: None
