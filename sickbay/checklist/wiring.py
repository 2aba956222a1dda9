"""Settings without effect: a model built again with one value changed, and its output compared bit for bit."""

from __future__ import annotations

import copy
import dataclasses
import inspect
import re
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Literal, get_args, get_origin, get_type_hints

import torch
from torch import Tensor, nn

from sickbay.checklist.calling import Calling, first_rows, outputs_of
from sickbay.checklist.result import Finding, Row
from sickbay.checklist.target import Target
from sickbay.patient import is_user_file

ROWS = 2
MOST = 24  # settings tried
# What shapes a model; settings of other kinds (learning rate, paths, token ids) are read elsewhere.
_ARCHITECTURE = re.compile(
    r"head|layer|depth|block|dropout|pdrop|p_drop|rope|rotary|causal|bias|norm|swiglu|gelu|activation|act_fn|gated|ffn|mlp|hidden"
    r"|window|alibi|pos(ition)?|scale|eps|theta|tie|qk|residual|softcap|expert"
)
# Read only where something else is switched on or when weights are drawn; a change without effect is no fault.
_ELSEWHERE = re.compile(
    r"init|seed|max_|context|block_size|seq|use_cache|output_|name|path|checkpoint|flash|sdpa|fused|compile|device|dtype"
)


@dataclass(frozen=True)
class Builder:
    """Builds a fresh model with settings changed. `settings`: name -> present value; `choices`: other values that a hint names."""

    build: Callable[[dict[str, Any]], nn.Module]
    settings: dict[str, Any]
    choices: dict[str, tuple[Any, ...]]


def wiring(target: Target, calling: Calling, seconds: float) -> dict[str, Any]:
    """Which settings were changed and which left everything bit-identical; JSON-able. Runs inside a copy of the process."""
    until = time.perf_counter() + seconds
    found = builder_of(target)
    if isinstance(found, str):
        return {"reason": found}
    batch = first_rows(target.batches[0], ROWS)
    if calling.conventions == ("batch",):
        return {"reason": "the loss takes the batch alone, so another model cannot be put into it"}
    first, second = _run(found, {}, calling, batch, target), _run(found, {}, calling, batch, target)
    if isinstance(first, str):
        return {"reason": f"the model cannot be built anew: {first}"}
    if isinstance(second, str) or not _equal(first, second):
        return {"reason": "two models built with one seed differ, so nothing can be compared"}
    effect: list[str] = []
    without: list[dict[str, Any]] = []
    refused: list[str] = []
    for name, value in _candidates(found.settings):
        if time.perf_counter() > until or len(effect) + len(without) >= MOST:
            break
        tried = [(other, _run(found, {name: other}, calling, batch, target)) for other in _others(name, value, found)]
        ran = [(other, made) for other, made in tried if not isinstance(made, str)]
        if not ran:
            refused.append(name)
        elif all(_equal(first, made) for _, made in ran):
            without.append({"name": name, "value": repr(value), "tried": [repr(other) for other, _ in ran]})
        else:
            effect.append(name)
    return {"effect": effect, "without": without, "refused": refused, "source": _class_line(target.model)}


def builder_of(target: Target) -> Builder | str:
    """How to build another model like `target.model`; a reason where that is not known."""
    model = target.model
    code = getattr(type(model).forward, "__code__", None)
    if code is None or not is_user_file(code.co_filename):
        return f"{type(model).__name__} belongs to a library, which has tests of its own"
    parameters = list(inspect.signature(type(model).__init__).parameters.values())[1:]
    needed = [p.name for p in parameters if p.default is p.empty and p.kind not in (p.VAR_POSITIONAL, p.VAR_KEYWORD)]
    if len(needed) <= 1 and parameters:
        config = next(
            (getattr(model, name) for name in (parameters[0].name, "config", "cfg", "args", "hparams") if hasattr(model, name)), None
        )
        if config is not None and _fields(config) and not isinstance(config, (int, float, str, nn.Module)):
            return Builder(lambda changes: type(model)(_changed(config, changes)), _fields(config), _choices(config))
    factory = _factory(target)
    if factory is not None:
        return factory
    missing = [name for name in needed if not hasattr(model, name)]
    if missing:
        return f"{type(model).__name__} keeps no config and not its {missing[0]}: there is nothing to build another one from"
    given = {p.name: getattr(model, p.name) for p in parameters if hasattr(model, p.name)}
    if not given or any(isinstance(value, (nn.Module, Tensor)) for value in given.values()):
        return f"{type(model).__name__} has no settings that could be changed"
    return Builder(lambda changes: type(model)(**{**given, **changes}), given, {})


def _factory(target: Target) -> Builder | None:
    """The target's own function, where it has settings with defaults."""
    make = target.make
    if make is None:
        return None
    try:
        given = {p.name: p.default for p in inspect.signature(make).parameters.values() if p.default is not p.empty}
    except (TypeError, ValueError):
        return None
    if not given:
        return None

    def build(changes: dict[str, Any]) -> nn.Module:
        from sickbay.checklist.target import _parts

        model: nn.Module = _parts(make(**changes), target.name)["model"]
        return model

    return Builder(build, given, {})


def _fields(config: Any) -> dict[str, Any]:
    if dataclasses.is_dataclass(config) and not isinstance(config, type):
        return {field.name: getattr(config, field.name) for field in dataclasses.fields(config) if field.init}
    if isinstance(config, Mapping):
        return dict(config)
    own = {name: value for name, value in getattr(config, "__dict__", {}).items() if not name.startswith("_")}
    of_class = (
        {} if type(config).__module__ in ("argparse", "types") else {n: v for n, v in vars(type(config)).items() if not n.startswith("_")}
    )
    return {name: value for name, value in {**of_class, **own}.items() if isinstance(value, (bool, int, float, str))}


def _choices(config: Any) -> dict[str, tuple[Any, ...]]:
    try:
        hints = get_type_hints(type(config))
    except Exception:
        return {}
    return {name: get_args(hint) for name, hint in hints.items() if get_origin(hint) is Literal}


def _changed(config: Any, changes: dict[str, Any]) -> Any:
    if not changes:
        return copy.deepcopy(config)
    if dataclasses.is_dataclass(config) and not isinstance(config, type):
        return dataclasses.replace(config, **changes)
    if isinstance(config, Mapping):
        return type(config)({**config, **changes})  # type: ignore[call-arg]
    other = copy.deepcopy(config)
    for name, value in changes.items():
        setattr(other, name, value)
    return other


def _candidates(settings: dict[str, Any]) -> Iterator[tuple[str, Any]]:
    for name, value in settings.items():
        if isinstance(value, (bool, int, float, str)) and _ARCHITECTURE.search(name.lower()) and not _ELSEWHERE.search(name.lower()):
            yield name, value


def _others(name: str, value: Any, builder: Builder) -> list[Any]:
    """Other values that the setting may have; several where the first may be refused."""
    if name in builder.choices:
        return [other for other in builder.choices[name] if other != value]
    if isinstance(value, bool):
        return [not value]
    if "drop" in name.lower() and isinstance(value, (int, float)):
        return [0.5 if value < 0.4 else 0.1]
    if isinstance(value, int):
        return [other for other in (value * 2, value // 2, value + 1, 1) if other > 0 and other != value]
    if isinstance(value, float):
        return [value * 8 if value else 0.5, value / 8 if value else 2.0]
    return []


def _run(builder: Builder, changes: dict[str, Any], calling: Calling, batch: Any, target: Target) -> list[Tensor] | str:
    """Loss, outputs and weights' shapes of a fresh model on `batch`, in training mode; the error's text where it cannot be."""
    try:
        torch.manual_seed(0)
        model = builder.build(changes).to(target.device).train()
        torch.manual_seed(1)
        # Weights that start at zero (a residual's output, a bias) would hide what lies before them.
        with torch.no_grad():
            for parameter in model.parameters():
                if parameter.dim() < 2 or not bool(parameter.any()):
                    parameter.add_(torch.randn(parameter.shape).to(parameter), alpha=0.02)
        loss, outputs = outputs_of(model, calling, batch)
        shapes = [torch.tensor([float(dim) for dim in parameter.shape]) for parameter in model.parameters()]
        return [loss.detach(), *outputs, *shapes]
    except Exception as problem:
        return f"{type(problem).__name__}: {problem}"[:200]


def _equal(one: list[Tensor], other: list[Tensor]) -> bool:
    return len(one) == len(other) and all(a.shape == b.shape and torch.equal(a, b) for a, b in zip(one, other))


def _class_line(model: nn.Module) -> str:
    code = type(model).forward.__code__
    return f"{code.co_filename}:{code.co_firstlineno}"


def wiring_row(seen: dict[str, Any]) -> tuple[Row, list[Finding]]:
    """Does every setting of the model that can be changed change its output?"""
    if "reason" in seen:
        return Row("settings", "not examined", seen["reason"]), []
    tried = len(seen["effect"]) + len(seen["without"])
    if not tried:
        return Row("settings", "not examined", "the model has no setting that could be changed", data=seen), []
    if not seen["without"]:
        return Row("settings", "ok", f"each of {tried} changes the output: {', '.join(seen['effect'][:8])}", data=seen), []
    names = [item["name"] for item in seen["without"]]
    first = seen["without"][0]
    summary = (
        f"{', '.join(names)} {'has' if len(names) == 1 else 'have'} no effect: with {first['name']} {first['value']} changed to "
        f"{' and '.join(first['tried'])}, weights' shapes, outputs and loss of a fresh model are the same to the last bit."
    )
    cure = "read the setting where the model is built and called, or remove it"
    finding = Finding("setting-without-effect", summary, "warning", names[0], seen["source"], 0.0, None, "changed bits", cure)
    return Row("settings", "found", f"{len(names)} of {tried} without effect: {', '.join(names)}", ("setting-without-effect",), seen), [
        finding
    ]
