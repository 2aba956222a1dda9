"""Are the gradients right? Each is held against the loss's change along a random direction, in float64."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Sequence
from itertools import groupby
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from sickbay.checklist.calling import Calling, first_rows
from sickbay.checklist.overfit import _without_dropout
from sickbay.checklist.result import Finding, Row
from sickbay.checklist.target import Target
from sickbay.core.diagnosis import Threshold, number
from sickbay.patient import is_user_file, mapped

ROWS = 2
GROUPS = 12
LARGEST = 200_000_000  # parameters beyond which a float64 copy costs more memory than this is worth
STEP = 1e-5  # of the weights' own RMS: in float64 the error of a central difference is near its least there
NUDGE = 1e-6  # of the input's spread
FLAT = 0.9  # share of outputs that the nudge leaves as they are
WRONG = Threshold(1e-3, "relative error", source="torch.autograd.gradcheck's default rtol in float64")


class InFloat64(TorchFunctionMode):
    """Inside, what asks for float32 or lower gets float64: a loss that casts its logits would round the differences away."""

    LOW = (torch.float32, torch.float16, torch.bfloat16)

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = getattr(func, "__name__", "")
        if name in ("float", "half", "bfloat16") and len(args) == 1:
            return args[0].double() if args[0].is_floating_point() else func(*args, **(kwargs or {})).double()
        args = tuple(torch.float64 if isinstance(a, torch.dtype) and a in self.LOW else a for a in args)
        kwargs = {k: torch.float64 if isinstance(v, torch.dtype) and v in self.LOW else v for k, v in (kwargs or {}).items()}
        return func(*args, **kwargs)


def derivative(target: Target, calling: Calling, seconds: float) -> dict[str, Any]:
    """Analytic and numeric slopes for each part of the model; JSON-able. Runs inside a copy of the process."""
    until = time.perf_counter() + seconds
    model = target.model.train()
    count = sum(p.numel() for p in model.parameters())
    if count > LARGEST:
        return {"reason": f"{count:,} parameters: a float64 copy is dear; examine a smaller one of the same kind"}
    batch = mapped(first_rows(target.batches[0], ROWS), lambda t: t.double() if t.is_floating_point() else t)
    torch.set_default_dtype(torch.float64)
    model.double()
    if isinstance(calling.loss, nn.Module):
        calling.loss.double()
    with InFloat64():
        if not _without_dropout(model, calling, batch):
            return {"reason": "the loss is random even with dropout off"}
        loss = calling(model, batch)
        functions = [one for one in _own_functions(loss) if not _on_purpose(one["class"], lambda: calling(model, batch))]
        trainable = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
        gradients = dict(zip((name for name, _ in trainable), torch.autograd.grad(loss, [p for _, p in trainable], allow_unused=True)))
        if loss.dtype != torch.float64:
            return {"reason": f"the loss stays in {str(loss.dtype).removeprefix('torch.')} although the model is in float64"}
        parts = []
        generator = torch.Generator().manual_seed(0)
        for name, members in _parts(trainable):
            if time.perf_counter() > until:
                break
            used = [(p, g) for p, g in ((p, gradients[n]) for n, p in members) if g is not None and not g.is_sparse]
            if used:
                parts.append({"part": name, **_slopes(model, calling, batch, used, generator)})
    return {"parts": parts, "functions": [{"name": one["name"], "source": one["source"]} for one in functions]}


def _parts(trainable: Sequence[tuple[str, Tensor]]) -> Iterator[tuple[str, list[tuple[str, Tensor]]]]:
    """Neighbouring parameters in at most a dozen parts, by the beginning of their names."""
    for depth in (4, 3, 2, 1):
        keys = [_part_of(name, depth) for name, _ in trainable]
        groups = [(key, [trainable[at] for at in places]) for key, places in groupby(range(len(keys)), keys.__getitem__)]
        if len(groups) <= GROUPS or depth == 1:
            yield from groups[:GROUPS]
            return


def _part_of(name: str, depth: int) -> str:
    """The module's name down to `depth`, for the parameter `name`."""
    return ".".join(name.split(".")[:-1][:depth])


def _slopes(model: nn.Module, calling: Calling, batch: Any, used: list[tuple[Any, Tensor]], generator: torch.Generator) -> dict[str, Any]:
    directions = [torch.randn(p.shape, generator=generator, dtype=torch.float64).to(p.device) for p, _ in used]
    # Along the gradient's signs no slope cancels out; the random part sees components that the gradient lacks.
    directions = [d + g.sign() for d, (_, g) in zip(directions, used)]
    scale = math.sqrt(sum(float((p.detach() ** 2).sum()) for p, _ in used) / sum(p.numel() for p, _ in used)) or 0.02
    analytic = sum(float((g * d).sum()) for (_, g), d in zip(used, directions))
    errors = []
    for step in (STEP * scale, STEP * scale / 10):
        values = []
        with torch.no_grad():
            for sign in (1, -1):
                for (p, _), d in zip(used, directions):
                    p.add_(d, alpha=sign * step)
                values.append(float(calling(model, batch)))
                for (p, _), d in zip(used, directions):
                    p.sub_(d, alpha=sign * step)
        numeric = (values[0] - values[1]) / (2 * step)
        size = max(abs(numeric), abs(analytic))
        # What rounding of the loss itself may make of the difference is no error of the gradient.
        noise = 1e-14 * (abs(values[0]) + 1) / step
        errors.append((max(abs(numeric - analytic) - noise, 0.0) / size if size > noise else 0.0, numeric))
    error, numeric = min(errors)
    return {"analytic": analytic, "numeric": numeric, "error": error}


def _on_purpose(cls: Any, forward: Callable[[], Any]) -> bool:
    """True for a Function whose gradient is meant to be another than its forward's: what rounds (flat), or passes its input on as it is."""
    original = cls.apply
    calls: list[bool] = []

    def apply(*args: Any) -> Any:
        given = next((place for place, arg in enumerate(args) if isinstance(arg, Tensor) and arg.is_floating_point()), None)
        if given is not None and not calls:
            with torch.no_grad():
                x = args[given].detach()
                moved = x + NUDGE * torch.randn(x.shape, dtype=x.dtype).to(x.device) * x.std().nan_to_num(1.0)
                outputs = [original(*args[:given], value, *args[given + 1 :]) for value in (x, moved)]
            one, other = (value for value in (o[0] if isinstance(o, tuple) else o for o in outputs))
            calls.append(float((one == other).double().mean()) > FLAT or (one.shape == x.shape and torch.equal(one, x)))
        return original(*args)

    cls.apply = apply
    try:
        forward()
    finally:
        del cls.apply
    return bool(calls and calls[0])


def _own_functions(loss: Tensor) -> list[dict[str, Any]]:
    """The custom autograd Functions of user files in the loss's graph, with the line of their backward."""
    found: dict[str, dict[str, Any]] = {}
    stack, seen = [loss.grad_fn], set()
    while stack:
        node = stack.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        stack += [child for child, _ in node.next_functions]
        cls = getattr(type(node), "_forward_cls", None)
        backward = getattr(cls, "backward", None)
        code = getattr(backward, "__code__", None)
        if cls is not None and code is not None and is_user_file(code.co_filename):
            name = cls.__name__
            found[name] = {"name": name, "class": cls, "source": f"{code.co_filename}:{code.co_firstlineno}"}
    return list(found.values())


def derivative_row(seen: dict[str, Any]) -> tuple[Row, list[Finding]]:
    """Do slopes and gradients agree? Only a custom backward is blamed: elsewhere a difference is a detach() on purpose."""
    if "reason" in seen:
        return Row("derivative", "not examined", seen["reason"]), []
    if not seen["parts"]:
        return Row("derivative", "not examined", "no part could be measured in the time given"), []
    wrong = [part for part in seen["parts"] if part["error"] > WRONG and abs(part["numeric"]) > 1e-9]
    flat = [part for part in seen["parts"] if part["error"] > WRONG and abs(part["numeric"]) <= 1e-9]
    worst = max(seen["parts"], key=lambda part: part["error"])
    text = f"{len(seen['parts'])} parts in float64, relative error at most {number(worst['error'])} ({worst['part']})"
    if not wrong or not seen["functions"]:
        if wrong:
            text += "; not every path carries a gradient (detach, straight-through or reversal on purpose)"
        elif flat:
            text += "; the loss is flat where a gradient passes (straight-through)"
        return Row("derivative", "ok", text, data=seen), []
    worst = max(wrong, key=lambda part: part["error"])
    ratio = worst["analytic"] / worst["numeric"]
    names = ", ".join(function["name"] for function in seen["functions"])
    summary = (
        f"The backward of {names} disagrees with its forward: the gradient of {worst['part']} has slope {number(worst['analytic'])} "
        f"where the loss's own is {number(worst['numeric'])} ({ratio:.3g} of it), and {len(wrong)} parts are wrong."
    )
    finding = Finding(
        "wrong-gradient",
        summary,
        "critical",
        worst["part"],
        seen["functions"][0]["source"],
        worst["error"],
        WRONG,
        WRONG.unit,
        "derive backward again, and hold it against torch.autograd.gradcheck",
    )
    return Row("derivative", "found", text, ("wrong-gradient",), seen), [finding]
