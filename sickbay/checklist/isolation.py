"""Questions that may do anything to the model, asked so that nothing of it remains.

Where a process can be forked, a question runs in a copy of it: whatever it changes dies with the copy, a crash costs one answer, and
one that takes too long is ended. Elsewhere (CUDA is in use) it runs here, and everything that could have changed is put back.
"""

from __future__ import annotations

import contextlib
import copy
import gc
import os
import random
import sys
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from sickbay.exams import fork
from sickbay.exams.fork import NoAnswer

if TYPE_CHECKING:
    from sickbay.checklist.target import Target

GRACE = 10.0  # seconds that a question may be late before its process is ended


class Isolation:
    """Asks questions about `target`. `threads`: of a forked copy; more than one only if this process never computed with more."""

    def __init__(self, target: Target, threads: int = 1) -> None:
        self._target = target
        self._threads = threads
        self.terminal: int | None = None
        if sys.stderr is not None and sys.stderr.isatty():
            # A copy's own stderr is silenced; what shows progress writes here.
            self.terminal = os.dup(2)

    def close(self) -> None:
        """The terminal's copy is closed."""
        if self.terminal is not None:
            os.close(self.terminal)
            self.terminal = None

    def ask(self, question: Callable[[], Any], seconds: float) -> Any:
        """`question()`'s JSON-able answer; NoAnswer with the reason after `seconds` (and some grace) or any failure."""
        if not fork.can_fork():
            return fork.ask(lambda: self._in_the_copy(question), seconds + GRACE)
        with kept(self._target):
            try:
                return question()
            except Exception as problem:
                return NoAnswer(f"{type(problem).__name__}: {problem}"[:500])

    def _in_the_copy(self, question: Callable[[], Any]) -> Any:
        gc.enable()
        if self._threads > 1:
            torch.set_num_threads(self._threads)
        return question()


@contextlib.contextmanager
def randomness_kept() -> Iterator[None]:
    """On leaving, the global random states of Python, numpy (if it is loaded) and torch are as on entering."""
    state = random.getstate()
    numpy = sys.modules.get("numpy")
    numpy_state = numpy.random.get_state() if numpy is not None else None
    cpu = torch.get_rng_state()
    cuda = torch.cuda.get_rng_state_all() if torch.cuda.is_initialized() else []
    try:
        yield
    finally:
        random.setstate(state)
        if numpy is not None and numpy_state is not None:
            numpy.random.set_state(numpy_state)
        torch.set_rng_state(cpu)
        if cuda:
            torch.cuda.set_rng_state_all(cuda)


@contextlib.contextmanager
def kept(target: Target) -> Iterator[None]:
    """On leaving, model (weights, buffers, gradients, modes, attributes), optimizer and random states are as on entering."""
    modules = [(module, _attributes(module)) for module in target.model.modules()]
    tensors = {id(tensor): tensor for module, _ in modules for tensor in (*module.parameters(False), *module.buffers(False))}
    states = [(tensor, tensor.requires_grad, _Contents(tensor), tensor.grad) for tensor in tensors.values()]
    gradients = [(grad, _Contents(grad)) for _, _, _, grad in states if grad is not None]
    optimizer = target.optimizer
    groups = [dict(group, params=list(group["params"])) for group in optimizer.param_groups] if optimizer is not None else []
    memory = {key: copy.deepcopy(value) for key, value in optimizer.state.items()} if optimizer is not None else {}
    default, threads = torch.get_default_dtype(), torch.get_num_threads()
    with randomness_kept():
        try:
            yield
        finally:
            torch.set_default_dtype(default)
            if torch.get_num_threads() != threads:
                torch.set_num_threads(threads)
            for module, attributes in modules:
                module.__dict__.clear()
                module.__dict__.update(attributes)
            with torch.no_grad():
                for gradient, contents in gradients:
                    contents.put_back(gradient)
                for tensor, requires_grad, contents, grad in states:
                    contents.put_back(tensor)
                    tensor.requires_grad_(requires_grad)
                    tensor.grad = grad
            if optimizer is not None:
                optimizer.state.clear()
                optimizer.state.update(memory)
                for group, before in zip(optimizer.param_groups, groups):
                    group.clear()
                    group.update(before)


class _Contents:
    """A tensor's memory and what stood in it."""

    def __init__(self, tensor: Tensor) -> None:
        self._data, self._values = tensor.data, tensor.detach().clone()

    def put_back(self, tensor: Tensor) -> None:
        """The tensor has its memory again (`module.double()` exchanges it), with the old values."""
        tensor.grad = None
        tensor.data = self._data
        self._data.copy_(self._values)


def _attributes(module: nn.Module) -> dict[str, Any]:
    """The module's attributes; its own dicts, lists and sets as copies, since those are changed in place."""
    return {
        name: copy.copy(value) if type(value).__module__ in ("builtins", "collections") else value for name, value in vars(module).items()
    }
