"""Looks inside one forward pass: how attention scores are scaled, what is normalised, how large activations are, which units are dead."""

from __future__ import annotations

import math
import re
import sys
from collections import Counter
from typing import Any

import torch
from torch import Tensor, nn

from sickbay.exams import fork
from sickbay.exams.attention import Attention, attentions
from sickbay.exams.trace import Operation, batch_size, rerun
from sickbay.patient import ForwardCall, Patient, bare, has_parameters, is_user_file, tensors_in

SIGNALS = (
    "activation_rms",
    "normalization_ops",
    "attention_scale",
    "attention_logit_max",
    "attention_entropy",
    "dead_units",
)

_SCALE = re.compile(r"scale|scaling|scalar|multiplier|temperature")
_NORMALISING = frozenset(
    (
        "native_layer_norm",
        "_fused_rms_norm",
        "rms_norm",
        "native_batch_norm",
        "_native_batch_norm_legit",
        "cudnn_batch_norm",
        "native_group_norm",
        "rsqrt",
        "std",
        "std_mean",
        "var",
        "var_mean",
        "linalg_vector_norm",
        "norm",
    )
)
_RECTIFYING = frozenset(("relu", "relu_", "threshold", "clamp_min", "clamp_min_"))
_NO_BLOCKS = (nn.Linear, nn.LayerNorm, nn.Embedding, nn.ModuleDict)
_ROWS = 4
_MANY_ROWS = 64
_POSITIONS = 64  # of all rows together: of fewer nothing could be said about a single unit
_MAX_ELEMENTS = 1 << 17
_TIMEOUT = 30.0


def examine(patient: Patient, step: int) -> list[dict[str, Any]] | fork.NoAnswer:
    """Readings of this step's training forward, made in a forked copy; NoAnswer says why there are none."""
    calls = [call for call in patient.training_calls() if not call.spent] or patient.training_calls()
    if not calls and patient.functional is None:
        return fork.NoAnswer("no forward pass through one outermost module was seen")
    found = fork.ask(lambda: _look(calls[-1] if calls else None, patient), _TIMEOUT)
    if isinstance(found, fork.NoAnswer):
        return found
    return [_with_history(patient, reading) for reading in found]


def _with_history(patient: Patient, reading: dict[str, Any]) -> dict[str, Any]:
    """Adds to `dead_units` the share of units that no exam so far has seen alive."""
    if reading["signal"] == "dead_units":
        dead = set(reading["note"].pop("dead"))
        before = patient.dead_units.get(reading["where"])
        patient.dead_units[reading["where"]] = still = dead if before is None else dead & before
        reading["note"]["all_dead_so_far"] = len(still) / max(1, reading["note"]["units"])
    return reading


def _look(call: ForwardCall | None, patient: Patient) -> list[dict[str, Any]]:
    rms: list[tuple[str, float]] = []
    if call is None:
        operations = _trace_function(patient)
        blocks: dict[int, str] = {}
    else:
        blocks = _blocks(bare(call.module))
        handle = nn.modules.module.register_module_forward_hook(lambda m, _, out: _note_rms(rms, blocks, m, out))
        operations = _forward(call)
        handle.remove()
    seen = attentions(operations)
    for attention in seen:
        attention.declared = attention.declared or (call is not None and _has_no_scale(bare(call.module), attention.module))
    readings: list[dict[str, Any]] = [
        {
            "signal": "activation_rms",
            "value": value,
            "where": name,
            "source": _line_in(name, operations),
            "note": {"depth": depth, "blocks": len(rms)},
        }
        for depth, (name, value) in enumerate(rms)
        if math.isfinite(value)
    ]
    kinds = [op.name for op in operations if op.name in _NORMALISING]
    counted = {name: kinds.count(name) for name in dict.fromkeys(kinds)}
    note = {"kinds": counted, "blocks": max(len(rms), len(seen))}
    readings.append({"signal": "normalization_ops", "value": len(kinds), "note": note})
    for attention in seen:
        readings.extend(_attention_readings(attention))
    readings.extend(_dead_units(operations))
    return readings


def _has_no_scale(root: nn.Module, path: str) -> bool:
    """True for a library's architecture that knows no scale at all (GPT-Neo): neither attention nor configuration has a number for it."""
    part = dict(root.named_modules()).get(path)
    file = getattr(sys.modules.get(type(part).__module__), "__file__", None)
    if part is None or file is None or is_user_file(file) or type(part).__module__.startswith("torch."):
        return False
    config = getattr(part, "config", None) or getattr(root, "config", None)
    return config is not None and not any(_SCALE.search(name) for name in (*vars(part), *vars(config)))


def _line_in(name: str, operations: list[Operation]) -> str:
    """The user's line of the last operation in the module `name`: where its output is put together."""
    return next((op.source for op in reversed(operations) if op.module == name and op.source), "")


def _rows(call: ForwardCall) -> int:
    """How many rows of the batch tell enough: a few of a sequence, more of a short one; of feature vectors and images many."""
    whole = [tensor for _, tensor in tensors_in((call.args, call.kwargs)) if tensor.dim() > 0 and len(tensor) == batch_size(call)]
    if not whole or not all(tensor.is_floating_point() for tensor in whole) or max(tensor.dim() for tensor in whole) not in (2, 4):
        length = max((tensor.shape[1] for tensor in whole if tensor.dim() > 1), default=1)
        return max(_ROWS, min(_MANY_ROWS, -(-_POSITIONS // max(1, length))))
    return max(_ROWS, min(_MANY_ROWS, _MAX_ELEMENTS * len(whole[0]) // max(1, sum(tensor.numel() for tensor in whole))))


def _forward(call: ForwardCall) -> list[Operation]:
    rows = _rows(call)
    if rows < batch_size(call):
        try:
            return rerun(call, rows=rows)[1]
        except Exception:  # a forward with the batch size written into it
            pass
    return rerun(call)[1]


def _trace_function(patient: Patient) -> list[Operation]:
    from sickbay.exams.trace import ModulePath, Tracer

    assert patient.functional is not None
    with ModulePath(nn.Module()) as path, torch.enable_grad():
        tracer = Tracer(path)
        with tracer:
            patient.functional()
    return tracer.operations


def _blocks(root: nn.Module) -> dict[int, str]:
    """The repeated blocks: members of one class, with parameters, that a ModuleList or Sequential has at least two of.

    What repeats inside a block (its experts, its heads) is none.
    """
    found: dict[int, str] = {}
    inside: set[int] = set()
    for name, holder in root.named_modules():
        if id(holder) in inside or not isinstance(holder, (nn.ModuleList, nn.Sequential)):
            continue
        members = [(key, part) for key, part in holder.named_children() if has_parameters(part) and not isinstance(part, _NO_BLOCKS)]
        common, count = Counter(type(part) for _, part in members).most_common(1)[0] if members else (None, 0)
        for key, part in members:
            if count > 1 and type(part) is common:
                found[id(part)] = f"{name}.{key}" if name else key
                inside.update(map(id, part.modules()))
    return found


def _note_rms(rms: list[tuple[str, float]], blocks: dict[int, str], module: nn.Module, output: Any) -> None:
    if id(module) in blocks:
        tensor = next((t for _, t in tensors_in(output) if t.is_floating_point()), None)
        if tensor is not None:
            rms.append((blocks[id(module)], tensor.detach().float().pow(2).mean().sqrt().item()))


def _attention_readings(attention: Attention) -> list[dict[str, Any]]:
    place = {"where": attention.module, "source": attention.source}
    note = {"head_dim": attention.head_dim, "factor": attention.factor, "steps": attention.steps, "declared": attention.declared}
    readings: list[dict[str, Any]] = [
        {"signal": "attention_scale", "value": attention.factor * math.sqrt(attention.head_dim), "note": note, **place}
    ]
    scores = attention.scores
    if scores is not None and scores.numel():
        scores = scores.detach().float()
        visible = scores > -1e4
        if bool(visible.any()):
            readings.append({"signal": "attention_logit_max", "value": scores[visible].abs().max().item(), **place})
            counts = visible.sum(-1)
            probabilities = torch.softmax(scores.masked_fill(~visible, -torch.inf), -1).nan_to_num()
            entropy = torch.special.entr(probabilities).sum(-1)
            many = counts > 1
            if bool(many.any()):
                share = torch.where(many, entropy / counts.clamp_min(2).float().log(), torch.nan)
                by_head = share.nanmean(-1)
                by_head = by_head.nanmean(0) if by_head.dim() > 1 else by_head
                readings.append({"signal": "attention_entropy", "value": by_head.min().item(), **place})
    return [reading for reading in readings if math.isfinite(reading["value"])]


def _dead_units(operations: list[Operation]) -> list[dict[str, Any]]:
    readings: list[dict[str, Any]] = []
    calls: Counter[str] = Counter()
    for op in operations:
        if op.name not in _RECTIFYING or not op.outputs or op.outputs[0].dim() < 2:
            continue
        if op.name != "relu" and op.name != "relu_" and any(scalar != 0 for scalar in op.scalars):
            continue
        output: Tensor = op.outputs[0].detach()
        alive = (output > 0).reshape(-1, output.shape[-1]).any(0)
        units = alive.numel()
        if output.numel() // max(units, 1) < 32 or units > 65_536:
            continue  # too few inputs to call a unit dead
        dead = (~alive).nonzero().reshape(-1).tolist()
        note = {"units": units, "dead": dead}
        calls[op.module] += 1
        # The second ReLU that one module calls is another layer, with a history of its own.
        where = op.module if calls[op.module] == 1 else f"{op.module}#{calls[op.module]}"
        readings.append({"signal": "dead_units", "value": len(dead) / units, "where": where, "source": op.source, "note": note})
    return readings
