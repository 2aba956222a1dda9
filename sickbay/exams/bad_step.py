"""The first-bad-step folder: the batch, RNG state and weights of the step, the failing operation, and a script that repeats it."""

from __future__ import annotations

import inspect
import json
import os
import sys
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from sickbay.exams.operand import kinds
from sickbay.exams.origin import named_inputs
from sickbay.patient import ForwardCall, Patient, bare

FOLDER = "first-bad-step"
MAX_BYTES = 256 << 20

REPRO = '''"""Repeats the first non-finite value of the run. Needs torch and safetensors.

Exit code 0: reproduced, with a line that says what. Exit code 1: the value came out finite here.
batch.safetensors, rng.safetensors and weights.safetensors hold the whole step for those who can build the model.
"""

import json
import sys
from pathlib import Path

import torch
from safetensors.torch import load_file

here = Path(__file__).resolve().parent
meta = json.loads((here / "meta.json").read_text())
operation = meta["operation"]
tensors = load_file(here / "operands.safetensors")


def decode(value):
    if isinstance(value, dict) and "tensor" in value:
        return tensors[value["tensor"]]
    if isinstance(value, dict) and "dtype" in value:
        return getattr(torch, value["dtype"])
    return [decode(item) for item in value] if isinstance(value, list) else value


def leaf(value):
    if isinstance(value, list):
        return [leaf(item) for item in value]
    return value.clone().requires_grad_() if isinstance(value, torch.Tensor) and value.is_floating_point() else value


def nonfinite(value):
    return [part for part in (value if isinstance(value, (list, tuple)) else [value])
            if isinstance(part, torch.Tensor) and part.is_floating_point() and not torch.isfinite(part.float()).all()]


def main():
    if operation["mode"] == "value":
        result, what = tensors[operation["tensor"]], operation["name"]
    else:
        namespace, name = operation["name"].split("::")
        function = getattr(getattr(getattr(torch.ops, namespace), name), operation["overload"])
        args, kwargs = decode(operation["args"]), {key: decode(value) for key, value in operation["kwargs"].items()}
        what = operation["name"]
        if operation["mode"] == "gradient":
            args = leaf(args)
            output = function(*args, **kwargs)
            first = output[0] if isinstance(output, (list, tuple)) else output
            cotangent = tensors.get("cotangent", torch.ones_like(first))
            flat = [item for value in args for item in (value if isinstance(value, list) else [value])]
            leaves = [value for value in flat if isinstance(value, torch.Tensor) and value.requires_grad]
            result = [part for part in torch.autograd.grad(first, leaves, cotangent, allow_unused=True) if part is not None]
            what = "the gradient of " + what
        else:
            result = function(*args, **kwargs)
    bad = nonfinite(result)
    if not bad:
        print(f"not reproduced: {what} is finite here")
        return 1
    count = sum(int((~torch.isfinite(part.float())).sum()) for part in bad)
    total, line = sum(part.numel() for part in bad), meta["source"] or "line unknown"
    print(f"reproduced: {what} gives {count} non-finite of {total} elements ({meta['phase']}, {line})")
    return 0


sys.exit(main())
'''


class Tensors:
    """Tensors to be saved under names, within one bound for the whole folder; `skipped` says what did not fit."""

    def __init__(self) -> None:
        self.left = MAX_BYTES
        self.skipped: list[str] = []

    def take(self, named: list[tuple[str, Tensor]]) -> dict[str, Tensor]:
        """Contiguous CPU copies of `named` as far as they fit and can be stored."""
        taken: dict[str, Tensor] = {}
        for name, tensor in named:
            if tensor.layout != torch.strided or tensor.nbytes > self.left:
                self.skipped.append(f"{name}: {tensor.nbytes} bytes" if tensor.layout == torch.strided else f"{name}: {tensor.layout}")
                continue
            self.left -= tensor.nbytes
            taken[name] = tensor.detach().cpu().contiguous().clone()
        return taken


def operation_of(
    function: Any, args: tuple[Any, ...], kwargs: dict[str, Any], mode: str
) -> tuple[dict[str, Any], list[tuple[str, Tensor]]]:
    """The JSON that repro.py runs (`mode` "forward" or "gradient") and the tensors it refers to."""
    tensors: list[tuple[str, Tensor]] = []

    def encode(value: Any) -> Any:
        if isinstance(value, Tensor):
            tensors.append((f"operand{len(tensors)}", value))
            return {"tensor": tensors[-1][0]}
        if isinstance(value, torch.dtype):
            return {"dtype": str(value).removeprefix("torch.")}
        if isinstance(value, (list, tuple)):
            return [encode(item) for item in value]
        return value if isinstance(value, (bool, int, float, str)) else None

    fields = {
        "mode": mode,
        "name": function._schema.name,
        "overload": function._schema.overload_name or "default",
        "args": [encode(value) for value in args],
        "kwargs": {key: encode(value) for key, value in kwargs.items() if encode_worthy(value)},
    }
    return fields, tensors


def encode_worthy(value: Any) -> bool:
    """False for devices, layouts and memory formats: the repetition runs on the CPU."""
    return value is None or isinstance(value, (Tensor, torch.dtype, bool, int, float, str, list, tuple))


def value_of(name: str, tensor: Tensor) -> tuple[dict[str, Any], list[tuple[str, Tensor]]]:
    """The JSON and tensor for a value that was not finite to begin with: an input or a weight."""
    return {"mode": "value", "name": name, "tensor": "value"}, [("value", tensor)]


def repeats(function: Any, args: tuple[Any, ...], kwargs: dict[str, Any], mode: str) -> bool:
    """True when running the operation again on copies of its operands gives the non-finite result that repro.py will look for."""
    copies = [value.detach().clone() if isinstance(value, Tensor) else value for value in args]
    try:
        if mode == "forward":
            with torch.no_grad():
                result = function(*copies, **kwargs)
            results = result if isinstance(result, (tuple, list)) else [result]
        else:
            leaves = [value.requires_grad_() for value in copies if isinstance(value, Tensor) and value.is_floating_point()]
            with torch.enable_grad():
                output = function(*copies, **kwargs)
                first = output[0] if isinstance(output, (tuple, list)) else output
                results = torch.autograd.grad(first, leaves, torch.ones_like(first), allow_unused=True)
        return any(kinds(part) for part in results if isinstance(part, Tensor))
    except (RuntimeError, TypeError, ValueError):
        return False


def save(
    folder: str,
    patient: Patient,
    call: ForwardCall | None,
    fields: dict[str, Any],
    operation: tuple[dict[str, Any], list[tuple[str, Tensor]]] | None,
) -> str:
    """What was written to `folder`/first-bad-step, in words; also when it could not be. An older first step is never overwritten.

    `fields`: phase, source, op and where of the finding. `call`: the root's forward, None where no module was called.
    """
    target = Path(folder) / FOLDER
    if (target / "meta.json").exists():
        return f"{FOLDER}/ keeps the earlier step"
    try:
        from safetensors.torch import save_file

        target.mkdir(parents=True, exist_ok=True)
        room = Tensors()
        operands = room.take(operation[1]) if operation else {}
        whole = operation is not None and len(operands) == len(operation[1])
        save_file(operands, target / "operands.safetensors")
        save_file(room.take([(name.replace("/", "."), tensor) for name, tensor in batch_of(patient, call)]), target / "batch.safetensors")
        save_file(room.take([("torch_cpu", call.rng)] if call else []), target / "rng.safetensors")
        save_file(room.take(weights_of(patient, call)), target / "weights.safetensors")
        meta = {
            **fields,
            "operation": operation[0] if operation and whole else None,
            "module": module_of(call),
            **program(),
            "skipped": room.skipped,
        }
        if whole:
            (target / "repro.py").write_text(REPRO, encoding="utf-8")
        (target / "meta.json").write_text(json.dumps(meta, indent=1), encoding="utf-8")
    except Exception as problem:
        return f"{FOLDER}/ could not be written: {type(problem).__name__}: {problem}"
    parts = [f"{FOLDER}/: operands, batch, RNG state and weights"]
    parts.append("repro.py repeats the value" if whole else "no repro.py, because the operation's operands are not all known")
    if room.skipped:
        parts.append(f"left out beyond {MAX_BYTES >> 20} MB: {', '.join(room.skipped[:4])}")
    return "; ".join(parts)


def batch_of(patient: Patient, call: ForwardCall | None) -> list[tuple[str, Tensor]]:
    """The root's inputs by argument name and the targets of this step's losses."""
    inputs = named_inputs(call) if call is not None else []
    return [*inputs, *((f"targets{index}", loss.targets) for index, loss in enumerate(patient.losses) if isinstance(loss.targets, Tensor))]


def weights_of(patient: Patient, call: ForwardCall | None) -> list[tuple[str, Tensor]]:
    """The root's parameters and buffers by name; without a root, the optimizers' parameters by group and position."""
    if call is not None:
        module = bare(call.module)
        return [*module.named_parameters(), *module.named_buffers()]
    return [(name, parameter) for name, parameter in optimizer_parameters(patient)]


def optimizer_parameters(patient: Patient) -> list[tuple[str, Tensor]]:
    """Every optimizer's parameters as `group 0[3]`."""
    groups = [group for optimizer in patient.optimizers for group in optimizer.param_groups]
    return [
        (f"group {number}[{index}]", parameter) for number, group in enumerate(groups) for index, parameter in enumerate(group["params"])
    ]


def module_of(call: ForwardCall | None) -> dict[str, Any] | None:
    """Where the root's class is written, for those who can build it again."""
    if call is None:
        return None
    kind = type(bare(call.module))
    try:
        file = inspect.getfile(kind)
    except (TypeError, OSError):
        file = ""
    return {"class": kind.__qualname__, "import": kind.__module__, "file": file, "training": call.training, "autocast": str(call.autocast)}


def program() -> dict[str, Any]:
    """The script as it was started."""
    return {"script": os.path.abspath(sys.argv[0]) if sys.argv and sys.argv[0] else "", "argv": sys.argv[1:], "torch": torch.__version__}
