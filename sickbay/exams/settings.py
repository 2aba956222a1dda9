"""Whether the settings that a script's own model was built from do anything: a fresh model with one of them changed, compared bit for bit.

Asked once, on a copy of the process, where the model keeps the configuration that its class is built from. Only settings that are
switched on and whose meaning leaves no doubt are tried: heads, dropout, and switches that are True.
"""

from __future__ import annotations

import copy
import dataclasses
import inspect
import re
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

from sickbay.core.record import RecordWriter
from sickbay.exams import fork
from sickbay.exams.asking import Asking
from sickbay.patient import ForwardCall, Patient, autocast_of, bare, is_user_file, tensors_in
from sickbay.probes.loop import Loop

SIGNALS = ("setting_effect",)

_AT_STEP = 2
_LARGEST = 20_000_000  # parameters: a fresh model of more is not worth a run's time
_TIMEOUT = 20.0
_HELD_AS = ("config", "cfg", "args", "hparams", "conf", "params")
_HEADS = re.compile(r"^(n|num)_?(attention_)?heads?$")
_PARTS = r"attn|attention|resid|residual|hidden|ffn|mlp|embd|emb|embed|embedding"
_DROPOUT = re.compile(rf"^((({_PARTS})_?)?(dropout|pdrop)(_p|_rate|_prob)?|({_PARTS})_drop|p_dropout|dropout_?p)$")
_SWITCHES = re.compile(r"^(use_?)?(rope|rotary|alibi|swiglu|geglu|qk_?norm|rms_?norm|layer_?norm|bias|causal)$")


class Settings:
    """Puts the question once, in an early step, about the model of the newest training forward."""

    SIGNALS = SIGNALS

    def __init__(self, patient: Patient, record: RecordWriter, asking: Asking) -> None:
        self.patient, self.record, self.asking = patient, record, asking
        self._asked = False

    def backward_begin(self, loss: Tensor | None, kind: str) -> None:
        if self._asked or self.record.step < _AT_STEP or kind == "func":
            return
        self._asked = True
        calls = [call for call in self.patient.training_calls() if not call.spent]
        model = bare(calls[0].module) if calls else None
        held = configuration(model) if model is not None else None
        if model is None or held is None or sum(p.numel() for p in model.parameters()) > _LARGEST:
            return
        trials = list(changes(held[1]))
        if not trials:
            return
        answer = self.asking.ask(lambda: fork.ask(lambda: compare(calls[0], held, trials), _TIMEOUT))
        if isinstance(answer, (fork.NoAnswer, str)):
            self.record.unobserved("setting_effect", answer if isinstance(answer, str) else answer.reason)
            return
        code = type(model).__init__.__code__
        for reading in answer:
            note = {"was": reading["value"], "tried": reading["tried"]}
            self.record.read("setting_effect", reading["changed"], reading["name"], note, f"{code.co_filename}:{code.co_firstlineno}")


def configuration(model: nn.Module) -> tuple[str, Any] | None:
    """(parameter of the class's constructor, the configuration in it), if it takes nothing else that has no default; None otherwise."""
    code = getattr(type(model).__init__, "__code__", None)
    if code is None or not is_user_file(code.co_filename):
        return None
    needed = [name for name, p in inspect.signature(type(model)).parameters.items() if p.default is p.empty]
    kinds = {p.kind for p in inspect.signature(type(model)).parameters.values()}
    if len(needed) != 1 or kinds & {inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD}:
        return None
    held = [getattr(model, name, None) for name in (needed[0], *_HELD_AS)]
    config = next((value for value in held if value is not None and not isinstance(value, (int, float, str, nn.Module, Tensor))), None)
    return None if config is None else (needed[0], config)


def changes(config: Any) -> Iterator[tuple[str, Any, list[Any]]]:
    """(name, value, other values) of each setting that is on and that must show in what the model computes."""
    fields = config if isinstance(config, dict) else getattr(config, "__dict__", {})
    for name, value in fields.items():
        if not isinstance(name, str):
            continue
        if isinstance(value, bool):
            if value and _SWITCHES.match(name.lower()):
                yield name, value, [False]
        elif isinstance(value, int) and value > 1 and _HEADS.match(name.lower()):
            yield name, value, [other for other in (value // 2, 1, value * 2) if 0 < other != value]
        elif isinstance(value, float) and 0 < value < 1 and _DROPOUT.match(name.lower()):
            yield name, value, [0.9 if value < 0.5 else 0.1]


def compare(call: ForwardCall, held: tuple[str, Any], trials: list[tuple[str, Any, list[Any]]]) -> list[dict[str, Any]] | str:
    """For each setting the share of outputs that change with it, 1 where the model itself changes; or why nothing can be said.

    To be called in a forked copy only.
    """
    parameter, config = held
    original = bare(call.module)

    def run(changed: Any) -> list[Tensor]:
        torch.manual_seed(0)
        model = type(original)(**{parameter: changed}).train()
        model.load_state_dict(original.state_dict())
        torch.manual_seed(1)
        with torch.no_grad(), autocast_of(call):
            output = model(*call.args, **call.kwargs)
        return [tensor for _, tensor in tensors_in(output) if tensor.is_floating_point()]

    first = run(copy.deepcopy(config))
    if not first or not _same(first, run(copy.deepcopy(config))):
        return "the model built anew from its configuration does not compute the same twice"
    found = []
    for name, value, others in trials:
        shares = []
        for other in others:
            try:
                shares.append(0.0 if _same(first, run(_with(config, name, other))) else 1.0)
            except Exception:  # another shape or a refusal: the setting is read
                shares.append(1.0)
            if shares[-1]:
                break
        found.append({"name": name, "value": value, "tried": " or ".join(map(str, others)), "changed": max(shares)})
    return found


def _same(one: list[Tensor], other: list[Tensor]) -> bool:
    return len(one) == len(other) and all(a.shape == b.shape and torch.equal(a, b) for a, b in zip(one, other, strict=True))


def _with(config: Any, name: str, value: Any) -> Any:
    if isinstance(config, dict):
        return {**config, name: value}
    if dataclasses.is_dataclass(config) and not isinstance(config, type):
        return dataclasses.replace(config, **{name: value})
    other = copy.deepcopy(config)
    setattr(other, name, value)
    return other


def attach(patient: Patient, record: RecordWriter, loop: Loop, asking: Asking) -> Callable[[], None]:
    """From now on the script's own model is asked once whether its settings do anything."""
    probe = Settings(patient, record, asking)
    loop.on("backward_begin", probe, probe.backward_begin)
    loop.rests(probe)
    return lambda: None
