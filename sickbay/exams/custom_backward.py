"""Backward passes that the script writes itself: is the gradient they return the derivative of what their forward computes?

The question is put where such a Function runs, with the very inputs it is given, on a copy of the process and in float64. Nothing is
kept for it. A Function that rounds, passes its input on or reverses its gradient has another gradient on purpose, and shows it.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import BackwardCFunction

from sickbay.core.record import RecordWriter
from sickbay.exams import fork
from sickbay.exams.asking import Asking
from sickbay.patient import Patient, is_user_file
from sickbay.probes import loss_lines
from sickbay.probes.loop import Loop

SIGNALS = ("gradient_error",)

_LOOKS = (0, 1, 5, 20)  # steps of a training in which the graph is searched for Functions
_NODES = 20_000
_CLASSES = 8  # of the script's Functions that are asked about
_DIRECTIONS = 6
_STEPS = (1e-5, 2.5e-6)  # of the difference quotient, relative to the input's RMS: two, to see whether there is a derivative
_SMOOTH = 0.01  # relative: two quotients that differ by more belong to no derivative
_STEPPED = 0.05  # of the outputs: where fewer change when every input does, the forward is a flight of steps
_MOST = 1 << 21  # elements of one input
_TIMEOUT = 20.0


class CustomBackward:
    """Finds the script's Functions in the graph of a loss, and asks about each the next time it runs."""

    SIGNALS = SIGNALS

    def __init__(self, patient: Patient, record: RecordWriter, loop: Loop, asking: Asking) -> None:
        self.patient, self.record, self.loop, self.asking = patient, record, loop, asking
        self._known: set[type] = set()
        self._armed: dict[type, Any] = {}

    def backward_begin(self, loss: Tensor | None, kind: str) -> None:
        if self.loop.pace.steps not in _LOOKS or loss is None or kind == "func" or loss_lines._compiles():
            return
        for function in functions_of(loss):
            if function not in self._known and len(self._known) < _CLASSES:
                self._known.add(function)
                self._arm(function, 0)
            elif function in self._known and function not in self._armed and self.loop.pace.steps == _LOOKS[-1]:
                # Near zero a wrong derivative may agree with the right one: once more with what has been learnt, at another place.
                self._arm(function, 1)

    def _arm(self, function: type, passed: int) -> None:
        """The next call of `function`'s forward but `passed` is preceded by the question; after it the class is as it was."""
        own = function.__dict__.get("forward")  # None where it is inherited
        if not isinstance(inspect.getattr_static(function, "forward"), staticmethod):
            return
        original = function.forward  # type: ignore[attr-defined]
        with_context = function.setup_context is torch.autograd.Function.setup_context  # type: ignore[attr-defined]

        left = [passed]

        def forward(*args: Any, **kwargs: Any) -> Any:
            if left[0] or not any(isinstance(arg, Tensor) and arg.requires_grad for arg in args):  # an evaluation has no backward
                left[0] -= left[0] > 0
                return original(*args, **kwargs)
            self._disarm(function)
            if self.loop.awake() and not kwargs:
                with self.loop.sheltered("forward", self):
                    self._ask(function, args[1:] if with_context else args)
            return original(*args, **kwargs)

        self._armed[function] = own
        function.forward = staticmethod(forward)  # type: ignore[attr-defined]

    def _disarm(self, function: type) -> None:
        if function not in self._armed:
            return
        own = self._armed.pop(function)
        if own is None:
            del function.forward  # type: ignore[attr-defined]
        else:
            function.forward = own  # type: ignore[attr-defined]

    def _ask(self, function: type, args: tuple[Any, ...]) -> None:
        answer = self.asking.ask(lambda: fork.ask(lambda: compare(function, args), _TIMEOUT))
        if isinstance(answer, fork.NoAnswer):
            self.record.unobserved("gradient_error", f"{function.__name__} could not be run in float64 on a copy: {answer.reason}")
            return
        backward = _code_of_backward(function)
        source = f"{backward.co_filename}:{backward.co_firstlineno}"
        if isinstance(answer, str):
            self.record.unobserved("gradient_error", f"{function.__name__}: {answer}")
        elif isinstance(answer, dict):
            self.record.read("gradient_error", answer.pop("error"), where=function.__name__, note=answer, source=source)

    def detach(self) -> None:
        for function in tuple(self._armed):
            self._disarm(function)


def functions_of(loss: Tensor) -> list[type]:
    """The script's own autograd Functions in the graph of `loss`."""
    found: dict[type, None] = {}
    queue: list[Any] = [loss.grad_fn]
    seen = set(queue)
    while queue and len(seen) < _NODES:
        node = queue.pop()
        if isinstance(node, BackwardCFunction):
            function = getattr(node, "_forward_cls", None)
            if isinstance(function, type):
                code = _code_of_backward(function)
                if code is not None and is_user_file(code.co_filename):
                    found[function] = None
        for child, _ in getattr(node, "next_functions", ()):
            if child is not None and child not in seen:
                seen.add(child)
                queue.append(child)
    return list(found)


def _code_of_backward(function: Any) -> Any:
    """The script's own code behind `once_differentiable`, `custom_bwd` and the like; None where there is none."""
    return getattr(inspect.unwrap(function.backward), "__code__", None) if callable(getattr(function, "backward", None)) else None


def compare(function: Any, args: tuple[Any, ...]) -> dict[str, Any] | str:
    """The worst relative error of the returned directional derivatives, as a reading's parts; or why there is nothing to say.

    To be called in a forked copy only: it runs the script's own forward and backward.
    """
    inputs = [arg.detach().double().clone() if isinstance(arg, Tensor) and arg.is_floating_point() else arg for arg in args]
    asked = [i for i, arg in enumerate(args) if isinstance(arg, Tensor) and arg.is_floating_point() and arg.requires_grad]
    if not asked or any(inputs[i].numel() > _MOST for i in asked):
        return "its inputs are too large to be tried" if asked else "none of its inputs has a gradient"
    generator = torch.Generator().manual_seed(0)
    outputs = _run(function, inputs)
    weights = [torch.randn(out.shape, generator=generator, dtype=torch.float64) for out in outputs]
    if any(not torch.equal(a, b) for a, b in zip(outputs, _run(function, inputs), strict=True)):
        return "its forward is random"
    if any(out.shape == inputs[i].shape and torch.equal(out, inputs[i]) for out in outputs for i in asked):
        return "its forward passes the input on, so its gradient is changed on purpose"
    returned = _returned(function, inputs, asked, weights)
    worst: dict[str, Any] = {}
    for i in asked:
        if returned[i] is None:
            continue
        found = _differences(function, inputs, i, weights, returned[i], generator)
        if found == "constant":
            return "its forward is piecewise constant, so its gradient is a stand-in on purpose"
        if isinstance(found, dict) and (not worst or found["error"] > worst["error"]):
            worst = {**found, "input": i, "shape": list(inputs[i].shape)}
        if isinstance(found, dict) and _passes_through(function, returned[i], weights):
            return "its backward passes the gradient straight through on purpose"
    return worst or "its forward has no derivative at these inputs"


def _run(function: Any, inputs: list[Any]) -> list[Tensor]:
    torch.manual_seed(0)
    with torch.no_grad():
        outputs = function.apply(*(value.clone() if isinstance(value, Tensor) else value for value in inputs))
    outputs = outputs if isinstance(outputs, tuple) else (outputs,)
    return [out.double() for out in outputs if isinstance(out, Tensor) and out.is_floating_point()]


def _returned(function: Any, inputs: list[Any], asked: list[int], weights: list[Tensor]) -> dict[int, Tensor | None]:
    """What the script's backward returns for each asked input, `weights` being the outputs' gradients."""
    torch.manual_seed(0)
    leaves = [value.clone().requires_grad_(i in asked) if isinstance(value, Tensor) else value for i, value in enumerate(inputs)]
    # A Function may not write into a leaf; a view of it is none.
    with torch.enable_grad():
        given = [leaf.view_as(leaf) if isinstance(leaf, Tensor) else leaf for leaf in leaves]
        outputs = function.apply(*given)
        outputs = outputs if isinstance(outputs, tuple) else (outputs,)
        floats = [out for out in outputs if isinstance(out, Tensor) and out.is_floating_point()]
        pairs = [(out, weight) for out, weight in zip(floats, weights, strict=True) if out.requires_grad]
        gradients = torch.autograd.grad(
            [out for out, _ in pairs], [leaves[i] for i in asked], [weight.to(out.dtype) for out, weight in pairs], allow_unused=True
        )
    return dict(zip(asked, gradients, strict=True))


def _differences(function: Any, inputs: list[Any], i: int, weights: list[Tensor], returned: Any, generator: Any) -> dict[str, Any] | str:
    """The error over several directions in input `i`; "constant" or "rough" where the forward has no derivative to compare with."""
    size = float(inputs[i].pow(2).mean().sqrt()) or 1.0
    numeric, analytic = [], []
    moved = 0.0
    for _ in range(_DIRECTIONS):
        direction = torch.randn(inputs[i].shape, generator=generator, dtype=torch.float64)
        quotients = []
        for step in _STEPS:
            sides = []
            for sign in (1, -1):
                shifted = [*inputs[:i], inputs[i] + sign * step * size * direction, *inputs[i + 1 :]]
                sides.append(_run(function, shifted))
            change = sum(float(((up - down) * weight).sum()) for up, down, weight in zip(*sides, weights, strict=True))
            moved = max(moved, _share_changed(*sides))
            quotients.append(change / (2 * step * size))
        if abs(quotients[0] - quotients[1]) <= _SMOOTH * max(abs(q) for q in quotients):
            numeric.append(quotients[1])
            analytic.append(float((returned.double() * direction).sum()))
    if moved < _STEPPED:
        return "constant"
    if len(numeric) < _DIRECTIONS / 2 or not all(map(math.isfinite, (*numeric, *analytic))):
        return "rough"
    error = math.dist(numeric, analytic) / max(math.hypot(*numeric), math.hypot(*analytic), 1e-300)
    return {"error": error, "analytic": analytic[0], "numeric": numeric[0], "directions": len(numeric)}


def _share_changed(one: list[Tensor], other: list[Tensor]) -> float:
    """The share of elements that are not the same in both."""
    count = sum(tensor.numel() for tensor in one)
    return sum(int((a != b).sum()) for a, b in zip(one, other, strict=True)) / max(1, count)


def _passes_through(function: Any, returned: Any, weights: list[Tensor]) -> bool:
    """True if backward returns the gradient it is given, and never asks for anything that forward could have kept for it."""
    names = _code_of_backward(function).co_names
    keeps = "saved_tensors" in names or any(name in names for name in ("saved_for_forward", "to_save"))
    return not keeps and any(returned.shape == weight.shape and torch.equal(returned, weight) for weight in weights)


def attach(patient: Patient, record: RecordWriter, loop: Loop, asking: Asking) -> Callable[[], None]:
    """From now on the script's own autograd Functions are asked for their gradients, each once."""
    probe = CustomBackward(patient, record, loop, asking)
    loop.on("backward_begin", probe, probe.backward_begin)
    loop.rests(probe)
    return probe.detach
