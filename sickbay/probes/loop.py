"""The one place that hooks torch: it turns what a training loop does into events, and every other probe only listens.

Events, in the order a plain loop causes them:
    forward_begin(call)  loss(loss_call)  forward_end(call, output)  backward_asked()  backward_begin(loss, kind)  backward_end(loss, kind)
    unscaled()  clip(norm, max_norm, parameters)  step_begin(optimizer, late)  step_end(optimizer)  left_out(scale)  scaler(scale, skipped)
    round_end(step)  functional(rerun)  optimizer_created(optimizer)  compiling()  outgrown(function, operands, result, start)

A step that is slept through (nap.py) causes none of these but slept(nap); or woken(nap), and then what is left of it.
A step that is given a closure makes its gradients inside: closure_begin(optimizer) comes before it, step_begin with `late` after it.

Only outermost module calls are seen (outermost.py). `kind` is "backward", "grad" (torch.autograd.grad) or "func".
Whatever goes wrong in here is named in the report and reaches no script; only ctrl-C and the like pass through.
"""

from __future__ import annotations

import functools
import os
import threading
import time
from collections.abc import Callable, Iterator
from types import GeneratorType
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import optimizer as optimizer_internals

from sickbay.core.record import RecordWriter
from sickbay.patient import ForwardCall, Patient, tensors_in
from sickbay.probes import nap as naps
from sickbay.probes.arguments import clip_arguments, closure_of, first_tensor, noting
from sickbay.probes.events import Events
from sickbay.probes.outermost import Outermost, hook_id
from sickbay.probes.unseen import interpose, modes_present, out_of_sight, unseen

_MAX_BACKWARDS = 64  # in a step that may be slept through


class Loop(Events):
    """Hooks torch and emits what happens, in the thread and process that train."""

    def __init__(self, patient: Patient, record: RecordWriter, max_steps: int = 0) -> None:
        super().__init__(patient, record)
        self.max_steps = max_steps
        self.rounds = 0
        self._undo: list[Callable[[], None]] = []
        self._thread, self._process = threading.get_ident(), os.getpid()
        self._backward_depth = 0
        self._habit: naps.Habit | None = None
        self._looks: list[naps.Look | None] = []  # at the backwards of the step in progress
        self._round: list[int] = []
        self._last_round: list[int] = []
        self._outermost = Outermost(self.awake, self._sleeps_through, self._forward_begins, self._forward_ends, self.failed)

    def glances_at(self, call: ForwardCall) -> bool:
        """True for the first training forward of a step that is only glanced at; a second one before its backward is looked at."""
        return self.pace.resting and call.grad_enabled and call.training and sum(not known.spent for known in self.patient.calls) == 1

    def awake(self) -> bool:
        """True when the caller is the training thread of the watched process, outside compiled code and exams."""
        return (
            not self.patient.muted
            and not torch.compiler.is_compiling()
            and threading.get_ident() == self._thread
            and os.getpid() == self._process  # a forked data loader or worker has a thread of the same number
            and bool(self._undo)
        )

    # --- attaching ------------------------------------------------------------------------------------------------
    def attach(self) -> None:
        """Hook torch; `detach` undoes all of it."""
        self._undo.append(interpose(Tensor.backward, self._around_method))
        self.replace(torch.autograd, "backward", self._around_backward)
        self.replace(torch.autograd, "grad", self._around_grad)
        self.replace(torch.nn.utils, "clip_grad_norm_", self._around_clip)
        self.replace(torch.nn.utils.clip_grad, "clip_grad_norm_", self._around_clip)
        self.replace(torch.optim.Optimizer, "__init__", self._around_optimizer_init)
        self.replace(torch, "compile", self._around_compile)
        self.replace(nn.Module, "compile", self._around_module_compile)
        for name in ("grad", "grad_and_value"):
            self.replace(torch.func, name, self._around_func)
        number = hook_id()
        for hooks, hook in (
            (optimizer_internals._global_optimizer_pre_hooks, self._before_step),
            (optimizer_internals._global_optimizer_post_hooks, self._after_step),
        ):
            hooks[number] = hook
            self._undo.append(functools.partial(_remove, hooks, number))
        self._outermost.on()
        self._undo.append(self._outermost.stop)

    def detach(self) -> None:
        """Everything is as before `attach`."""
        while self._undo:
            self._undo.pop()()

    def replace(self, owner: Any, name: str, around: Callable[[Any], Any]) -> None:
        """`owner.name` is `around(original)` until `detach`."""
        original = owner.__dict__[name]
        replacement = functools.wraps(original)(around(original))
        setattr(owner, name, replacement)

        def restore() -> None:
            if owner.__dict__.get(name) is replacement:
                setattr(owner, name, original)

        self._undo.append(restore)

    # --- outermost module calls -------------------------------------------------------------------------------------
    def _forward_begins(self, call: ForwardCall) -> None:
        self.patient.admit(call)
        self.emit("forward_begin", call)

    def _forward_ends(self, call: ForwardCall, output: Any) -> None:
        call.finished = True
        with self.sheltered("forward_end"):
            call.output_shapes = [tuple(tensor.shape) for _, tensor in tensors_in(output)]
        self.emit("forward_end", call, output)

    # --- steps slept through ------------------------------------------------------------------------------------------
    def _sleeps_through(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
        if self.nap is None:
            return False
        if self.nap.forward(module, args, kwargs):
            return True
        self.wake()
        return False

    def napping(self) -> naps.Nap | None:
        """The step slept through, where the caller is the training thread."""
        return self.nap if self.nap is not None and threading.get_ident() == self._thread and not self.patient.muted else None

    def _end_nap(self, nap: naps.Nap) -> None:
        """A step slept through is over. What is called here comes out of cold caches, and costs several times what its length suggests."""
        began = time.perf_counter()
        self.nap = None
        try:
            if modes_present():
                with out_of_sight():
                    self.tell_slept(nap)
            else:
                self.tell_slept(nap)
            self.record.plain_step(nap.readings)
            self.rounds += 1
            self.seconds += time.perf_counter() - began
            self._fall_asleep()
        except Exception as problem:
            self.failed("slept", problem)

    # --- gradients --------------------------------------------------------------------------------------------------
    def _around_backward(self, original: Any) -> Any:
        @unseen
        def backward(tensors: Any, *args: Any, **kwargs: Any) -> Any:
            if self._backward_depth:
                return original(tensors, *args, **kwargs)
            nap = self.napping()
            if nap is not None and self.stays_asleep("backward_begin", self, nap.backward, tensors):
                return self._in_backward(original, tensors, *args, **kwargs)
            if not self.awake():
                return original(tensors, *args, **kwargs)
            if isinstance(tensors, Iterator):
                tensors = tuple(tensors)
            return self._during("backward", first_tensor(tensors), original, tensors, *args, **kwargs)

        return backward

    def _around_method(self, original: Any) -> Any:
        @unseen
        def backward(*args: Any, **kwargs: Any) -> Any:
            if self.nap is None and self.awake() and not self._backward_depth:
                self.emit("backward_asked")
            return original(*args, **kwargs)

        return backward

    def _around_grad(self, original: Any) -> Any:
        @unseen
        def grad(outputs: Any, *args: Any, **kwargs: Any) -> Any:
            if self._backward_depth or not self.awake() or kwargs.get("create_graph"):
                return original(outputs, *args, **kwargs)
            loss = first_tensor(outputs)
            with out_of_sight():
                whole = loss is not None and (torch._C._functorch.is_functorch_wrapped_tensor(loss) or loss.numel() != 1)
            if loss is None or whole:
                return original(outputs, *args, **kwargs)
            return self._during("grad", loss, original, outputs, *args, **kwargs)

        return grad

    @unseen
    def _during(self, kind: str, loss: Any, original: Any, *args: Any, **kwargs: Any) -> Any:
        with self.sheltered("backward_begin"):
            if len(self._looks) < _MAX_BACKWARDS:
                self._looks.append(naps.look(self.patient, loss))
        self.emit("backward_begin", loss, kind)
        outermost = self._outermost.present
        self._outermost.off()
        try:
            return self._in_backward(original, *args, **kwargs)
        finally:
            if not outermost and self._outermost.inside:
                self._outermost.off()
            self.emit("backward_end", loss, kind)
            with self.sheltered("backward_end"):
                self.patient.spend()

    @unseen
    def _in_backward(self, original: Any, *args: Any, **kwargs: Any) -> Any:
        self._backward_depth += 1
        try:
            return original(*args, **kwargs)
        finally:
            self._backward_depth -= 1
            self._outermost.on()

    def _around_func(self, original: Any) -> Any:
        @unseen
        def transform(func: Any, *outer: Any, **options: Any) -> Any:
            transformed = original(func, *outer, **options)

            @functools.wraps(transformed)
            @unseen
            def call(*args: Any, **kwargs: Any) -> Any:
                if not self.awake() or any(torch._C._functorch.is_functorch_wrapped_tensor(t) for _, t in tensors_in((args, kwargs))):
                    return transformed(*args, **kwargs)
                self.emit("functional", func, args, kwargs)
                result = transformed(*args, **kwargs)
                self.emit("backward_end", None, "func")
                return result

            return call

        return transform

    def _around_clip(self, original: Any) -> Any:
        @unseen
        def clip_grad_norm_(*args: Any, **kwargs: Any) -> Any:
            nap = self.napping()
            if nap is not None and nap.stage == "backward" and nap.clipped is None:
                nap.clipped = total = original(*args, **kwargs)
                return total
            if not self.awake() or len(args) + len(kwargs.keys() & {"parameters", "max_norm"}) < 2:
                return original(*args, **kwargs)
            parameters, max_norm, args = clip_arguments(args, kwargs)
            given: list[Any] = []
            if self.pace.resting:
                total = original(parameters, max_norm, *args, **kwargs)
            elif isinstance(parameters, GeneratorType):  # torch treats a generator in its own way, and warns when it is empty
                total = original(noting(parameters, given), max_norm, *args, **kwargs)
            else:
                parameters = list(parameters) if isinstance(parameters, Iterator) else parameters
                total = original(parameters, max_norm, *args, **kwargs)
                with self.sheltered("clip"):
                    given.extend([parameters] if isinstance(parameters, Tensor) else parameters)
            with self.sheltered("clip"):
                self.emit("clip", total, float(max_norm), given)
            return total

        return clip_grad_norm_

    # --- optimizers, compilation ------------------------------------------------------------------------
    def _around_optimizer_init(self, original: Any) -> Any:
        @unseen
        def __init__(optimizer: Any, *args: Any, **kwargs: Any) -> None:
            original(optimizer, *args, **kwargs)
            if self.awake():
                self.pace.wake()
                self.emit("optimizer_created", optimizer)

        return __init__

    def _before_step(self, optimizer: Any, args: Any, kwargs: Any) -> None:
        nap = self.napping()
        if nap is not None and self.stays_asleep("step_begin", self, nap.step, optimizer, args, kwargs):
            return
        if not self.awake():
            return
        with self.sheltered("step_begin"):
            self._outermost.on()  # ctrl-C may have cut a forward short, and the script gone on
            if id(optimizer) in self._round:
                # Another optimizer has taken over: what is known of this step's forward belongs to the step that begins.
                self._end_round(forget=False)
            # A closure makes the gradients inside step(): they can only be read afterwards.
            if closure_of(args, kwargs) is None:
                self.emit("step_begin", optimizer, False)
            else:
                self.emit("closure_begin", optimizer)

    def _after_step(self, optimizer: Any, args: Any, kwargs: Any) -> None:
        nap = self.napping()
        if nap is not None:
            self._end_nap(nap)
        elif not self.awake():
            return
        else:
            with self.sheltered("step_end"):
                if closure_of(args, kwargs) is not None:
                    self.emit("step_begin", optimizer, True)
                self.emit("step_end", optimizer)
                self._round.append(id(optimizer))
                if self._round[-1] == (self._last_round or self._round)[-1]:
                    self._habit = naps.habit_of(self.happened, self._looks, optimizer)
                    self._end_round()
        if 0 < self.max_steps <= self.record.step:
            raise SystemExit(0)  # what the user asked for: the script ends here, as by its own sys.exit

    def steps_taken(self) -> tuple[int, int]:
        """Changes whenever an optimizer steps."""
        return self.rounds, len(self._round)

    def _end_round(self, forget: bool = True) -> None:
        self._last_round, self._round = self._round, []
        self.end_step(forget)

    def end_step(self, forget: bool = True, by_hand: bool = False) -> None:
        """One optimizer step is over: its readings are written, its tensors let go.

        `by_hand`: no optimizer told of it but a probe that saw the weights move, and which therefore may not rest.
        """
        self.emit("round_end", self.record.step)
        if forget:
            self.patient.forget_step()
        self._next_step(may_rest=not by_hand)

    def _next_step(self, may_rest: bool = True) -> None:
        self.happened.clear()
        self._looks.clear()
        self.rounds += 1
        self.emit_seconds()
        self._fall_asleep(may_rest)

    def _fall_asleep(self, may_rest: bool = True) -> None:
        """The step that begins is slept through if it may be and is expected to be plain."""
        self.pace.step_over(self.seconds - self.patient.exam_seconds, may_rest)
        if (
            self._habit is not None
            and self.rounds % naps.AWAKE_EVERY
            and self.pace.resting
            and self.pace.rests_next
            and self.all_may_sleep()
        ):
            self.nap = naps.Nap(self._habit)

    def emit_seconds(self) -> None:
        """Write and commit the step; the time it takes counts as ours."""
        began = time.perf_counter()
        self.record.end_step()
        self.seconds += time.perf_counter() - began

    def _around_compile(self, original: Any) -> Any:
        @unseen
        def compile_(model: Any = None, *args: Any, **kwargs: Any) -> Any:
            target = getattr(model, "__self__", model)
            if model is not None and not isinstance(target, nn.Module):
                self._stop_watching_modules("a function was compiled: module calls inside it are not seen")
            self.emit("compiling")
            return original(model, *args, **kwargs)

        return compile_

    def _around_module_compile(self, original: Any) -> Any:
        @unseen
        def compile_(module: nn.Module, *args: Any, **kwargs: Any) -> Any:
            self.emit("compiling")
            self._stop_watching_modules("a module was compiled in place: its calls are not seen")
            return original(module, *args, **kwargs)

        return compile_

    def _stop_watching_modules(self, reason: str) -> None:
        with self.sheltered("compile"):
            self._outermost.stop()
            for signal in ("training_mode", "evaluation_mode", "batch_repeat", "future_influence", "past_blocked"):
                self.record.unobserved(signal, reason)


def _remove(hooks: dict[int, Any], number: int) -> None:
    hooks.pop(number, None)
