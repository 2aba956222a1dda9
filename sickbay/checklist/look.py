"""One forward and backward pass, looked at closely: shapes along the modules, values that are not finite, gradients, weights' spread."""

from __future__ import annotations

import math
import os
import time
import traceback
from typing import Any

import torch
from torch import Tensor, nn

from sickbay.checklist.calling import Calling, rows_of
from sickbay.checklist.result import Finding, Row
from sickbay.checklist.target import Target, tensors
from sickbay.core.diagnosis import Threshold, number
from sickbay.patient import is_user_file, tensors_in

WIDEST = Threshold(
    10.0, "x 1/sqrt(fan-in)", source="Kaiming and Xavier give 1 to 1.4, N(0, 0.02) 1.3 at width 4096, N(0, 1) 16 at width 256"
)
NARROWEST = Threshold(0.02, "x 1/sqrt(fan-in)", source="N(0, 0.02) with GPT-2's 1/sqrt(2 x layers) is 0.03 at width 64 and 6 layers")
VANISHED = Threshold(1e-10, "L2 norm", source="the guide's limit for a gradient that is as good as none")
_SHOWN = 400  # modules whose shapes are kept


def look(target: Target, calling: Calling) -> dict[str, Any]:
    """What one training pass over the first batch shows; JSON-able. Runs inside a copy of the process."""
    model, batch = target.model.train(), target.batches[0]
    shapes: list[dict[str, Any]] = []
    bad: list[dict[str, Any]] = []
    stack: list[str] = []
    hooks = _watch(model, shapes, bad, stack)
    began = time.perf_counter()
    answer: dict[str, Any] = {"inputs": [list(t.shape) for t in tensors(batch)], "rows": rows_of(batch)}
    answer["bad_input"] = sum(int((~torch.isfinite(t)).sum()) for t in tensors(batch) if t.is_floating_point())
    try:
        loss = calling(model, batch)
        answer["loss"] = float(loss.detach())
        answer["conventions"] = list(calling.conventions)
        answer["has_graph"] = loss.requires_grad
        if loss.requires_grad:
            loss.backward()
    except Exception as problem:
        answer["raised"] = " ".join(f"{type(problem).__name__}: {problem}".split())[:400]
        answer["source"] = _line(problem)
        answer["module"] = stack[-1] if stack else ""
    finally:
        for hook in hooks:
            hook.remove()
    answer.update(shapes=shapes[:_SHOWN], bad=bad[:8], seconds=time.perf_counter() - began)
    answer["bad_weights"] = [name for name, p in model.named_parameters() if not bool(torch.isfinite(p.detach()).all())][:8]
    answer.update(_gradients(model), weights=_weights(model))
    return answer


def _watch(model: nn.Module, shapes: list[dict[str, Any]], bad: list[dict[str, Any]], stack: list[str]) -> list[Any]:
    hooks = []
    for name, module in model.named_modules():

        def before(module: nn.Module, args: Any, kwargs: Any, name: str = name) -> None:
            stack.append(name or type(module).__name__)

        def after(module: nn.Module, args: Any, kwargs: Any, output: Any, name: str = name) -> None:
            stack.pop()
            given = next((tensor for _, tensor in tensors_in((args, kwargs))), None)
            made = max((tensor for _, tensor in tensors_in(output)), key=Tensor.numel, default=None)
            shape = [list(t.shape) if t is not None else None for t in (given, made)]
            shapes.append({"module": name, "type": type(module).__name__, "in": shape[0], "out": shape[1]})
            if made is not None and made.is_floating_point() and not bool(torch.isfinite(made.detach()).all()):
                bad.append({"module": name or type(module).__name__, "elements": int((~torch.isfinite(made.detach())).sum())})

        hooks.append(module.register_forward_pre_hook(before, with_kwargs=True))
        hooks.append(module.register_forward_hook(after, with_kwargs=True))
    return hooks


def _gradients(model: nn.Module) -> dict[str, Any]:
    trainable = {name: p for name, p in model.named_parameters() if p.requires_grad}
    have = {name: p.grad for name, p in trainable.items() if p.grad is not None}
    dense = [grad.coalesce().values() if grad.is_sparse else grad for grad in have.values()]
    norms = dict(zip(have, (float(n) for n in torch._foreach_norm([g.detach().float() for g in dense])))) if dense else {}
    total = math.sqrt(sum(n * n for n in norms.values()))
    return {
        "grad_norm": total,
        "grad_norms": norms,
        "without_gradient": [name for name in trainable if name not in have][:32],
        "bad_gradients": [name for name, n in norms.items() if not math.isfinite(n)][:8],
        "trainable": len(trainable),
    }


def _weights(model: nn.Module) -> list[dict[str, Any]]:
    """Spread of each matrix that a Linear or convolution multiplies by, against 1/sqrt(fan-in); biases and norms are not looked at."""
    seen: set[int] = set()
    found = []
    embedded = {id(module.weight) for module in model.modules() if isinstance(module, nn.Embedding)}
    for name, module in model.named_modules():
        weight = getattr(module, "weight", None)
        if not isinstance(module, (nn.Linear, nn.Conv1d, nn.Conv2d)) or not isinstance(weight, Tensor) or id(weight) in seen:
            continue
        seen.add(id(weight))
        values = weight.detach().float()
        fan_in = values[0].numel()
        if values.shape[0] < 2 or fan_in < 2:
            continue
        flat = values.flatten(1)
        std = float(values.std())
        found.append(
            {
                "name": f"{name}.weight",
                "std": std,
                "ratio": std * math.sqrt(fan_in),
                "zero": not bool(values.any()),
                "same_rows": bool((flat == flat[0]).all()),
                "tied": id(weight) in embedded,
            }
        )
    return found


def _line(problem: BaseException) -> str:
    frames = [(frame.f_code.co_filename, line) for frame, line in traceback.walk_tb(problem.__traceback__)]
    return next((f"{os.path.relpath(name)}:{at}" for name, at in reversed(frames) if is_user_file(name)), "")


# --- verdicts ------------------------------------------------------------------------------------------------------------
def shapes_row(seen: dict[str, Any]) -> tuple[Row, list[Finding]]:
    """Does a batch get through, and with which shapes?"""
    data = {"inputs": seen["inputs"], "modules": seen["shapes"], "rows": seen["rows"]}
    if "raised" in seen:
        condition = "shape-mismatch" if _about_shapes(seen["raised"]) else "training-fails"
        last = next((s for s in reversed(seen["shapes"]) if s["out"]), None)
        after = f"; the last module that gave a result: {last['module']} {last['in']} -> {last['out']}" if last else ""
        text = f"the first batch raises {seen['raised']}{after}"
        finding = Finding(
            condition, text, "critical", seen["module"], seen["source"], cure="see the line; until it runs nothing else can be examined"
        )
        return Row("shapes", "found", "the first batch does not get through", (condition,), data), [finding]
    given = ", ".join(str(tuple(shape)) for shape in seen["inputs"][:3])
    last = next((s for s in reversed(seen["shapes"]) if s["module"] == ""), None)
    made = f" -> {tuple(last['out'])}" if last and last["out"] is not None else ""
    return Row("shapes", "ok", f"batch {given}{made} through {len(seen['shapes'])} module calls", data=data), []


def _about_shapes(text: str) -> bool:
    words = ("shape", "size", "dimension", "broadcast", "mat1 and mat2", "must match")
    return text.startswith(("RuntimeError", "ValueError")) and any(word in text for word in words)


def finite_row(seen: dict[str, Any]) -> tuple[Row, list[Finding]]:
    """Is any value of the batch, weights, activations, loss or gradients NaN or infinite?"""
    places: list[tuple[str, str, str]] = []
    if seen["bad_input"]:
        places.append(("non-finite-input", "the batch", f"the first batch holds {seen['bad_input']} values that are NaN or infinite"))
    elif seen["bad_weights"]:
        names = ", ".join(seen["bad_weights"][:3])
        places.append(("non-finite-weights", seen["bad_weights"][0], f"weights are NaN or infinite before any step: {names}"))
    elif seen["bad"] and not math.isfinite(seen["loss"]):
        first = seen["bad"][0]
        places.append(("non-finite-values", first["module"], f"{first['elements']} values of its output are NaN or infinite"))
    elif not math.isfinite(seen["loss"]):
        places.append(("non-finite-values", "the loss", f"the loss is {seen['loss']} though the model's outputs are finite"))
    elif seen["bad_gradients"]:
        text = f"the gradient of {', '.join(seen['bad_gradients'][:3])} is NaN or infinite though the loss is finite"
        places.append(("non-finite-values", seen["bad_gradients"][0], text))
    findings = [Finding(condition, text, "critical", where) for condition, where, text in places]
    if findings:
        return Row("finite", "found", findings[0].summary, (findings[0].condition,)), findings
    return Row("finite", "ok", f"batch, {len(seen['shapes'])} outputs, loss {number(seen['loss'])} and all gradients are finite"), []


def gradients_row(seen: dict[str, Any]) -> tuple[Row, list[Finding]]:
    """Does every trainable parameter get a gradient? (Which of the missing ones matter, the condition missing-gradient knows.)"""
    norms: dict[str, float] = seen["grad_norms"]
    data = {"grad_norm": seen["grad_norm"], "grad_norms": norms, "without_gradient": seen["without_gradient"]}
    if not seen.get("has_graph", True) or not norms:
        text = "the loss depends on no trainable parameter: there is no graph from it to the model"
        cure = "look for detach(), .data, .item(), numpy or no_grad between model and loss"
        return Row("gradients", "found", text, ("missing-gradient",), data), [Finding("missing-gradient", text, "critical", cure=cure)]
    if math.isfinite(seen["grad_norm"]) and seen["grad_norm"] < VANISHED:
        text = f"all {len(norms)} gradients together have norm {number(seen['grad_norm'])}: nothing would be learnt"
        finding = Finding(
            "vanishing-gradients", text, "critical", "all parameters", value=seen["grad_norm"], limit=VANISHED, unit=VANISHED.unit
        )
        return Row("gradients", "found", text, ("vanishing-gradients",), data), [finding]
    some = [(value, name) for name, value in norms.items() if value > 0]
    (least, least_name), (most, most_name) = min(some, default=(0.0, "")), max(some, default=(0.0, ""))
    text = f"norm {number(seen['grad_norm'])}; {len(norms)} of {seen['trainable']} tensors, "
    text += f"{number(least)} {least_name} to {number(most)} {most_name}"
    return Row("gradients", "ok", text, data=data), []


def absent_row(seen: dict[str, Any]) -> tuple[Row, list[Finding]]:
    """The trainable parameters without a gradient, for when nobody could say whether they ought to have one."""
    names = seen["without_gradient"]
    text = f"{len(names)} of {seen['trainable']} trainable tensors got no gradient from the first batch: {', '.join(names[:3])}"
    finding = Finding(
        "missing-gradient", text, "warning", names[0], certainty="suspected", cure="reconnect them, or freeze them on purpose"
    )
    return Row("gradients", "found", text, ("missing-gradient",), {"without_gradient": names}), [finding]


def weights_row(seen: dict[str, Any]) -> tuple[Row, list[Finding]]:
    """Do the weights' spreads follow the fan rules, and can the units of a layer tell themselves apart?"""
    weights = [w for w in seen["weights"] if not w["zero"]]
    if not weights:
        return Row("weights", "not examined", "no Linear or convolution was found"), []
    judged = [w for w in weights if not w["tied"]]  # a tied head's spread is the embedding's, judged by the initial loss
    findings = []
    same = [w for w in weights if w["same_rows"]]
    wide = max((w for w in judged if w["ratio"] > WIDEST), key=lambda w: w["ratio"], default=None)
    narrow = [w for w in judged if w["ratio"] < NARROWEST and not w["same_rows"]]
    if same:
        text = f"all rows of {len(same)} matrices are equal ({same[0]['name']}): their units compute the same and learn the same"
        findings.append(
            Finding("poor-initialization", text, "critical", same[0]["name"], cure="draw weights at random (Xavier, or N(0, 0.02))")
        )
    elif wide is not None:
        text = f"{wide['name']} has standard deviation {number(wide['std'])}, {number(wide['ratio'])} times 1/sqrt(fan-in): "
        text += "its outputs are that much too large"
        cure = "Xavier or N(0, 0.02); 1/sqrt(2 x layers) of that for matrices that write to the residual stream"
        findings.append(Finding("poor-initialization", text, "warning", wide["name"], "", wide["ratio"], WIDEST, WIDEST.unit, cure))
    elif len(narrow) * 2 > len(judged):
        least = min(narrow, key=lambda w: w["ratio"])
        text = f"{len(narrow)} of {len(judged)} matrices are nearly zero ({least['name']}: standard deviation {number(least['std'])}): "
        text += "scaled twice?"
        findings.append(
            Finding(
                "poor-initialization", text, "note", least["name"], "", least["ratio"], NARROWEST, NARROWEST.unit, "Xavier or N(0, 0.02)"
            )
        )
    low, high = min(w["ratio"] for w in weights), max(w["ratio"] for w in weights)
    text = f"{len(weights)} matrices, standard deviation {number(low)} to {number(high)} times 1/sqrt(fan-in)"
    return Row("weights", "found" if findings else "ok", text, tuple(f.condition for f in findings), {"weights": weights}), findings
