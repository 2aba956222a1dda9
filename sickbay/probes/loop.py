"""The one place that hooks torch: it turns what a training loop does into events, and every other probe only listens.

Events, in the order a plain loop causes them:
    forward_begin(call)  loss(loss_call)  forward_end(call, output)  backward_begin(loss, kind)  backward_end(loss, kind)
    unscaled()  clip(norm, max_norm, parameters)  step_begin(optimizer)  step_end(optimizer)  scaler(scale, skipped)  round_end(step)
    functional(rerun)  optimizer_created(optimizer)

Only outermost module calls are seen: one global pre-hook is present between them and absent inside, so that inner
modules, compiled code and pickled models never meet it. `kind` is "backward", "grad" (torch.autograd.grad) or "func".
"""

from __future__ import annotations

import functools
import sys
import threading
import time
import traceback
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules import module as module_internals
from torch.optim.optimizer import register_optimizer_step_post_hook, register_optimizer_step_pre_hook

from sickbay.core.record import RecordWriter
from sickbay.patient import ForwardCall, Patient, tensors_in, user_line

_HOOK_ID = -0x51C6  # torch counts its own hook ids upwards from 0


class Loop:
    """Emits events to listeners; a listener that raises is dropped and named in the report, and the script never notices."""

    def __init__(self, patient: Patient, record: RecordWriter) -> None:
        self.patient, self.record = patient, record
        self.seconds = 0.0
        self.rounds = 0
        self._listeners: dict[str, list[tuple[Any, Callable[..., None]]]] = {}
        self._undo: list[Callable[[], None]] = []
        self._thread = threading.get_ident()
        self._backward_depth = 0
        self._round: list[int] = []
        self._last_round: list[int] = []
        self._post_hook: Any = None
        self._watch_modules = True
        self.problems: list[dict[str, Any]] = []

    # --- events ---------------------------------------------------------------------------------------------------
    def on(self, event: str, probe: Any, listener: Callable[..., None]) -> None:
        """`listener` is called at every `event` until its probe fails once."""
        self._listeners.setdefault(event, []).append((probe, listener))

    def emit(self, event: str, *args: Any) -> None:
        """Tell all listeners; never raises."""
        began = time.perf_counter()
        for probe, listener in tuple(self._listeners.get(event, ())):
            try:
                listener(*args)
            except Exception as problem:
                self._drop(probe, event, problem)
        self.seconds += time.perf_counter() - began

    def _drop(self, probe: Any, event: str, problem: Exception) -> None:
        name = getattr(probe, "__name__", type(probe).__name__).rsplit(".", 1)[-1]
        for listeners in self._listeners.values():
            listeners[:] = [(owner, listener) for owner, listener in listeners if owner is not probe]
        where = traceback.extract_tb(problem.__traceback__)[-1]
        text = f"{type(problem).__name__}: {problem} ({where.filename.rsplit('/', 1)[-1]}:{where.lineno})"
        self.problems.append({"probe": name, "event": event, "step": self.record.step, "error": text[:300]})
        try:
            self.record.fact("problems", self.problems)
            for signal in getattr(probe, "SIGNALS", ()):
                self.record.unobserved(signal, f"the {name} probe failed at step {self.record.step}: {text[:120]}")
        except Exception:
            pass

    def awake(self) -> bool:
        """True when the caller is the training thread of the watched process, outside compiled code and exams."""
        return not self.patient.muted and not torch.compiler.is_compiling() and threading.get_ident() == self._thread

    # --- attaching ------------------------------------------------------------------------------------------------
    def attach(self) -> None:
        """Hook torch; `detach` undoes all of it."""
        self._replace(torch.autograd, "backward", self._around_backward)
        self._replace(torch.autograd, "grad", self._around_grad)
        self._replace(torch.nn.utils, "clip_grad_norm_", self._around_clip)
        self._replace(torch.nn.utils.clip_grad, "clip_grad_norm_", self._around_clip)
        self._replace(torch.optim.Optimizer, "__init__", self._around_optimizer_init)
        self._replace(torch, "compile", self._around_compile)
        self._replace(nn.Module, "compile", self._around_module_compile)
        for name in ("grad", "grad_and_value"):
            self._replace(torch.func, name, self._around_func)
        scaler = torch.amp.grad_scaler.GradScaler
        self._replace(scaler, "scale", self._around_scale)
        self._replace(scaler, "unscale_", self._around_unscale)
        self._replace(scaler, "step", self._around_scaler_step)
        self._replace(scaler, "update", self._around_scaler_update)
        handles = [
            register_optimizer_step_pre_hook(self._before_step),
            register_optimizer_step_post_hook(self._after_step),
        ]
        self._undo.extend(handle.remove for handle in handles)
        self._modules_on()
        self._undo.append(self._modules_off)

    def detach(self) -> None:
        """Everything is as before `attach`."""
        while self._undo:
            self._undo.pop()()
        if self._post_hook is not None:
            self._post_hook.remove()
            self._post_hook = None

    def _replace(self, owner: Any, name: str, around: Callable[[Any], Any]) -> None:
        original = owner.__dict__[name]
        replacement = functools.wraps(original)(around(original))
        setattr(owner, name, replacement)

        def restore() -> None:
            if owner.__dict__.get(name) is replacement:
                setattr(owner, name, original)

        self._undo.append(restore)

    # --- outermost module calls -------------------------------------------------------------------------------------
    def _modules_on(self) -> None:
        if self._watch_modules:
            module_internals._global_forward_pre_hooks[_HOOK_ID] = self._outermost_begins

    def _modules_off(self) -> None:
        module_internals._global_forward_pre_hooks.pop(_HOOK_ID, None)

    def _outermost_begins(self, module: nn.Module, args: tuple[Any, ...]) -> None:
        try:
            if not self.awake() or torch._C._get_tracing_state() or not has_parameters(module):
                return
            self._modules_off()
            frame_locals = sys._getframe(1).f_locals
            call = ForwardCall(
                module=module,
                args=args,
                kwargs=dict(frame_locals.get("kwargs") or {}),
                grad_enabled=torch.is_grad_enabled(),
                training=module.training,
                rng=torch.get_rng_state(),
                source=user_line(3),
                autocast=_autocast_now(),
            )
            if self._post_hook is not None:
                self._post_hook.remove()
            self._post_hook = module.register_forward_hook(functools.partial(self._outermost_ends, call), always_call=True)
            self.patient.roots.add(module)
            self.patient.calls.append(call)
            if len(self.patient.calls) > 512:
                del self.patient.calls[:256]
            self.emit("forward_begin", call)
        except Exception as problem:
            self._drop(self, "forward_begin", problem)

    def _outermost_ends(self, call: ForwardCall, module: nn.Module, args: Any, output: Any) -> None:
        try:
            if output is not None:
                # Torch walks the hooks of a failed call without a copy: removing one then would hide the user's own error.
                self._post_hook.remove()
                self._post_hook = None
                call.finished = True
                call.output_shapes = [tuple(tensor.shape) for _, tensor in tensors_in(output)]
                self.emit("forward_end", call, output)
            self._modules_on()
        except Exception as problem:
            self._drop(self, "forward_end", problem)

    # --- gradients --------------------------------------------------------------------------------------------------
    def _around_backward(self, original: Any) -> Any:
        def backward(tensors: Any, *args: Any, **kwargs: Any) -> Any:
            if self._backward_depth or not self.awake():
                return original(tensors, *args, **kwargs)
            loss = tensors if isinstance(tensors, Tensor) else next(iter(tensors), None)
            return self._during("backward", loss, original, tensors, *args, **kwargs)

        return backward

    def _around_grad(self, original: Any) -> Any:
        def grad(outputs: Any, *args: Any, **kwargs: Any) -> Any:
            if self._backward_depth or not self.awake() or kwargs.get("create_graph"):
                return original(outputs, *args, **kwargs)
            loss = outputs if isinstance(outputs, Tensor) else next(iter(outputs), None)
            if not isinstance(loss, Tensor) or loss.numel() != 1 or torch._C._functorch.is_functorch_wrapped_tensor(loss):
                return original(outputs, *args, **kwargs)
            return self._during("grad", loss, original, outputs, *args, **kwargs)

        return grad

    def _during(self, kind: str, loss: Any, original: Any, *args: Any, **kwargs: Any) -> Any:
        self.emit("backward_begin", loss, kind)
        self._backward_depth += 1
        self._modules_off()
        try:
            return original(*args, **kwargs)
        finally:
            self._backward_depth -= 1
            self._modules_on()
            self.patient.finished_backwards += 1
            self.emit("backward_end", loss, kind)
            self.patient.spend()

    def _around_func(self, original: Any) -> Any:
        def transform(func: Any, *outer: Any, **options: Any) -> Any:
            transformed = original(func, *outer, **options)

            @functools.wraps(transformed)
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
        def clip_grad_norm_(parameters: Any, max_norm: float, *args: Any, **kwargs: Any) -> Any:
            if not self.awake():
                return original(parameters, max_norm, *args, **kwargs)
            given = [parameters] if isinstance(parameters, Tensor) else list(parameters)
            total = original(given, max_norm, *args, **kwargs)
            self.emit("clip", total, float(max_norm), given)
            return total

        return clip_grad_norm_

    # --- optimizers, loss scaling, compilation ------------------------------------------------------------------------
    def _around_optimizer_init(self, original: Any) -> Any:
        def __init__(optimizer: Any, *args: Any, **kwargs: Any) -> None:
            original(optimizer, *args, **kwargs)
            if self.awake():
                self.emit("optimizer_created", optimizer)

        return __init__

    def _before_step(self, optimizer: Any, args: Any, kwargs: Any) -> None:
        if self.awake():
            if id(optimizer) in self._round:
                # Another optimizer has taken over: what is known of this step's forward belongs to the step that begins.
                self._end_round(forget=False)
            # A closure makes the gradients inside step(): they can only be read afterwards.
            closure = kwargs.get("closure") or next((a for a in args if callable(a) and not isinstance(a, torch.optim.Optimizer)), None)
            if closure is None:
                self.emit("step_begin", optimizer, False)

    def _after_step(self, optimizer: Any, args: Any, kwargs: Any) -> None:
        if self.awake():
            closure = kwargs.get("closure") or next((a for a in args if callable(a) and not isinstance(a, torch.optim.Optimizer)), None)
            if closure is not None:
                self.emit("step_begin", optimizer, True)
            self.emit("step_end", optimizer)
            self._round.append(id(optimizer))
            if self._round[-1] == (self._last_round or self._round)[-1]:
                self._end_round()

    def _end_round(self, forget: bool = True) -> None:
        self._last_round, self._round = self._round, []
        self.end_step(forget)

    def end_step(self, forget: bool = True) -> None:
        """One optimizer step is over: its readings are written, its tensors let go."""
        self.emit("round_end", self.record.step)
        if forget:
            self.patient.forget_step()
        self.rounds += 1
        self.emit_seconds()

    def emit_seconds(self) -> None:
        """Write and commit the step; the time it takes counts as ours."""
        began = time.perf_counter()
        self.record.end_step()
        self.seconds += time.perf_counter() - began

    def _around_scale(self, original: Any) -> Any:
        def scale(scaler: Any, outputs: Any) -> Any:
            result = original(scaler, outputs)
            if self.awake() and scaler.is_enabled():
                self.patient.scale = float(scaler.get_scale())
            return result

        return scale

    def _around_unscale(self, original: Any) -> Any:
        def unscale_(scaler: Any, optimizer: Any) -> Any:
            result = original(scaler, optimizer)
            if self.awake():
                self.patient.scale = 1.0
                self.emit("unscaled")
            return result

        return unscale_

    def _around_scaler_step(self, original: Any) -> Any:
        def step(scaler: Any, optimizer: Any, *args: Any, **kwargs: Any) -> Any:
            if not self.awake() or not scaler.is_enabled():
                return original(scaler, optimizer, *args, **kwargs)
            before = self.rounds, len(self._round)
            result = original(scaler, optimizer, *args, **kwargs)
            self.emit("scaler", float(scaler.get_scale()), before == (self.rounds, len(self._round)))
            if before == (self.rounds, len(self._round)):
                self.end_step()
            return result

        return step

    def _around_scaler_update(self, original: Any) -> Any:
        def update(scaler: Any, *args: Any, **kwargs: Any) -> Any:
            result = original(scaler, *args, **kwargs)
            self.patient.scale = 1.0
            return result

        return update

    def _around_compile(self, original: Any) -> Any:
        def compile_(model: Any = None, *args: Any, **kwargs: Any) -> Any:
            target = getattr(model, "__self__", model)
            if model is not None and not isinstance(target, nn.Module):
                self._stop_watching_modules("a function was compiled: module calls inside it are not seen")
            self.patient.compiled = True
            return original(model, *args, **kwargs)

        return compile_

    def _around_module_compile(self, original: Any) -> Any:
        def compile_(module: nn.Module, *args: Any, **kwargs: Any) -> Any:
            self.patient.compiled = True
            self._stop_watching_modules("a module was compiled in place: its calls are not seen")
            return original(module, *args, **kwargs)

        return compile_

    def _stop_watching_modules(self, reason: str) -> None:
        self._watch_modules = False
        self._modules_off()
        for signal in ("training_mode", "evaluation_mode", "batch_repeat", "future_influence", "past_blocked"):
            self.record.unobserved(signal, reason)


def has_parameters(module: nn.Module) -> bool:
    """True if `module` or a part of it has a parameter."""
    return next(module.parameters(), None) is not None


def _autocast_now() -> tuple[str, torch.dtype] | None:
    for device in ("cpu", "cuda"):
        if torch.is_autocast_enabled(device):
            return device, torch.get_autocast_dtype(device)
    return None
