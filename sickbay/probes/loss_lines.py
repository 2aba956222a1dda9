"""The user's lines between the model's output and `backward`, learnt in a run's first steps for the day one of them makes a NaN.

Autograd's nodes do not know where they were made. A torch-function mode does, at a few microseconds a call; it is on
only for the first two steps, and a bad step's graph is then laid beside what was learnt.
"""

from __future__ import annotations

import os
import sys
import threading
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

from sickbay.patient import user_line
from sickbay.probes.unseen import unseen

STEPS = 2
LATER_STEPS = 8  # among them one that is looked at closely, where steps are fast
MAX_SEGMENTS = 16
MAX_NODES = 512

# (node name, function name, user's file:line), one for each autograd node in the order they were made.
Segment = list[tuple[str, str, str]]

# Told of each recorded call with positional arguments: (function, arguments, result, sequence number at the stretch's beginning).
Told = Callable[[Any, Any, Any, int], None]


class LossLines:
    """`begin()` where the model's forward ends, `end()` where backward begins; both may be called at any time, any number of times.

    `segments`: what was learnt, one list for each stretch; nothing is added after `steps` steps have been seen by `end_step`.
    """

    def __init__(self, segments: list[Any] | None = None, steps: int = STEPS, told: Told | None = None) -> None:
        self.segments: list[Any] = [] if segments is None else segments
        self._told = told
        self._left = steps
        self._mode: Recorder | None = None

    def begin(self) -> None:
        """The stretch after this call is recorded, unless enough was learnt, another function mode is active, or something was compiled.

        A mode on the stack makes torch's compiler recompile what it has compiled, and then the results differ in their last bits.

        Never raises.
        """
        self.end()
        if not self.learning:
            return
        try:
            if torch._C._len_torch_function_stack() == 0 and not torch.compiler.is_compiling() and not _compiles():
                mode = Recorder(self._told)
                torch._C._push_on_torch_function_stack(mode)
                self._mode = mode
        except Exception:
            self._mode = None

    def end(self) -> None:
        """Nothing of ours is on the function-mode stack of the thread that began, and what was seen is in `segments`. Never raises."""
        mode = self._mode
        if mode is None:
            return
        mode.recording = False
        if mode.thread != threading.get_ident():
            return  # each thread has its own stack: the mode only passes calls on until its own thread comes by
        if mode.made:
            self.segments.append(mode.made)
            mode.made = []
        if take_out(mode):
            self._mode = None

    @property
    def learning(self) -> bool:
        """True while stretches are still recorded."""
        return self._left > 0 and len(self.segments) < MAX_SEGMENTS

    def again(self) -> None:
        """Some of the next steps are recorded as the first ones were."""
        self._left = max(self._left, LATER_STEPS)

    def end_step(self) -> None:
        """One optimizer step is over; after the last of the recorded steps `begin` does nothing."""
        self.end()
        self._left -= 1


class Recorder(TorchFunctionMode):
    """Passes every call on unchanged and notes which autograd nodes it made; `told` is called with each, and must not raise."""

    def __init__(self, told: Told | None = None) -> None:
        super().__init__()
        self.told = told
        self.start = int(torch._C._autograd._get_sequence_nr())
        self.made: list[Any] = []
        self.recording = True
        self.thread = threading.get_ident()
        self.process = os.getpid()

    @unseen
    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        # A data loader's worker that was forked meanwhile has it on its stack for life.
        if not self.recording or len(self.made) >= MAX_NODES or os.getpid() != self.process:
            return func(*args, **(kwargs or {}))
        before = torch._C._autograd._get_sequence_nr()
        result = func(*args, **(kwargs or {}))
        self.note(func, result, before)
        if self.told is not None:
            self.told(func, args, result, self.start)
        return result

    def note(self, func: Any, result: Any, before: int) -> None:
        """What `func` made since sequence number `before` is known, if its `result` is a tensor with history. Never raises."""
        try:
            first = result[0] if isinstance(result, (tuple, list)) and result else result
            if isinstance(first, Tensor) and first.grad_fn is not None:
                self._note(func, first.grad_fn, before)
        except Exception:
            self.recording = False

    def _note(self, func: Any, node: Any, before: int) -> None:
        fresh = {node}
        queue = [node]
        while queue:
            for child, _ in queue.pop().next_functions:
                if child is not None and child not in fresh and before <= child._sequence_nr() < 1 << 62:
                    fresh.add(child)
                    queue.append(child)
        source, name = user_line(3), getattr(func, "__name__", str(func))
        made = sorted((child for child in fresh if child._sequence_nr() >= before), key=lambda child: int(child._sequence_nr()))
        self.made.extend((child.name(), name, source) for child in made)


def _compiles() -> bool:
    """True if anything was handed to torch's compiler; asking loads nothing."""
    compiler = sys.modules.get("torch._dynamo.eval_frame")
    return any(backend is not None for backend in getattr(compiler, "cached_backends", {}).values())


@unseen
def call_beside(function: Any, args: Any, kwargs: Any) -> Any:
    """The result of `function`, noted by a recorder that is not on the stack meanwhile: its warnings name the line they would name bare."""
    mode = torch._C._get_function_stack_at(0) if torch._C._len_torch_function_stack() == 1 else None
    if not isinstance(mode, Recorder) or not mode.recording:
        return function(*args, **kwargs)
    before = torch._C._autograd._get_sequence_nr()
    torch._C._pop_torch_function_stack()
    try:
        result = function(*args, **kwargs)
    finally:
        torch._C._push_on_torch_function_stack(mode)
    mode.note(function, result, before)
    return result


def take_out(mode: Any) -> bool:
    """True when `mode` is off the function-mode stack and whatever the user put above it is still there, in order.

    False while torch is inside a call that goes through `mode`: it is set aside then and comes back when that call returns.
    """
    depth = torch._C._len_torch_function_stack()
    if not any(torch._C._get_function_stack_at(index) is mode for index in range(depth)):
        return False
    above: list[Any] = []
    while (top := torch._C._pop_torch_function_stack()) is not mode:
        above.append(top)
    for other in reversed(above):
        torch._C._push_on_torch_function_stack(other)
    return True
