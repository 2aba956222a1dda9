"""How fast and how far: throughput against batch size, a learning-rate range test, memory, and the cached against the full forward."""

from __future__ import annotations

import math
import statistics
import time
from typing import Any

import torch
from torch import Tensor, nn

from sickbay.checklist.calling import Calling, divided, repeated, rows_of
from sickbay.checklist.result import Finding, Row
from sickbay.checklist.target import Target, tensors
from sickbay.core.diagnosis import Threshold, number

KNEE = Threshold(0.9, "share of the best rate", source="from here on a doubled batch gains less than a tenth")
GAIN = Threshold(1.5, "x", source="a gain below half is within what another machine's load makes")
RANGE_STEPS = 60
LOWEST, HIGHEST = 1e-7, 1.0
HIGHEST_SGD = 30.0
DIVERGED = Threshold(4.0, "x least loss", source="Smith 2017, arXiv 1506.01186, as fastai's and Lightning's finders stop")
NEIGHBOURS = 5  # steps over which the range test's losses are smoothed
LEAST_FALL = 0.01  # of the loss: with less the range test has seen nothing
TURNED = 0.05  # of the whole fall, by which the loss must rise to have turned
CACHED = Threshold(1e-2, "share of the logits' spread", source="float32 kernels of other shapes differ by 1e-5, float16 ones by some 1e-3")
FITS = Threshold(0.9, "share of memory", source="the rest is fragmentation, kernels and the data loader")


# --- throughput ----------------------------------------------------------------------------------------------------------
def throughput(target: Target, calling: Calling, seconds: float) -> dict[str, Any]:
    """Examples per second of forward and backward at batch sizes 1, 2, 4 ...; JSON-able. Runs inside a copy of the process."""
    until = time.perf_counter() + seconds
    model, batch = target.model.train(), target.batches[0]
    given = rows_of(batch)
    if not given:
        return {"reason": "the batch has no axis of examples"}
    curve: list[tuple[int, float]] = []
    rows = 1
    while rows <= max(4 * given, 8) and time.perf_counter() < until:
        several = repeated(batch, rows)
        try:
            took = min(_seconds(model, calling, several) for _ in range(3 if curve else 4))
        except (RuntimeError, ValueError, IndexError) as problem:
            if not curve:
                return {"reason": f"another batch size does not run: {problem}"[:200]}
            break
        curve.append((rows, rows / took))
        if 6 * took > until - time.perf_counter():
            break
        rows *= 2
    return {"curve": curve, "given": given}


def _seconds(model: nn.Module, calling: Calling, batch: Any) -> float:
    model.zero_grad(set_to_none=True)
    device = next(model.parameters()).device
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    began = time.perf_counter()
    calling(model, batch).backward()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter() - began


def throughput_row(seen: dict[str, Any]) -> tuple[Row, list[Finding]]:
    """Where does a larger batch stop to gain? Advice at most."""
    if "reason" in seen or len(seen.get("curve", ())) < 3:
        return Row("throughput", "not examined", seen.get("reason", "too slow for three batch sizes in the time given"), data=seen), []
    curve, given = seen["curve"], seen["given"]
    best = max(rate for _, rate in curve)
    knee = next(rows for rows, rate in curve if rate >= KNEE * best)
    now = max((rate for rows, rate in curve if rows <= given), default=curve[0][1])
    shown = ", ".join(f"{rows}: {number(rate)}" for rows, rate in curve)
    text = f"examples/s by batch size {shown}; knee at {knee}, yours is {given}"
    data = {**seen, "knee": knee}
    if given < knee and best > GAIN * now:
        cure = f"batches of {knee} with as many tokens a step, or the learning rate rescaled"
        summary = f"Batches of {knee} would train {best / now:.1f} times as many examples a second as your {given}."
        return Row("throughput", "found", text, ("small-batch",), data), [
            Finding("small-batch", summary, "note", value=best / now, limit=GAIN, unit=GAIN.unit, cure=cure)
        ]
    return Row("throughput", "ok", text, data=data), []


# --- learning rate -------------------------------------------------------------------------------------------------------
def rates(target: Target, calling: Calling, seconds: float) -> dict[str, Any]:
    """Loss while the learning rate rises from 1e-7 a step at a time; JSON-able. Runs inside a copy of the process."""
    until = time.perf_counter() + seconds
    model, optimizer = target.model.train(), target.optimizer
    given = max((float(group["lr"]) for group in optimizer.param_groups), default=None) if optimizer is not None else None
    if optimizer is None:
        optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=LOWEST)
    shares = [float(group["lr"]) / given if given else 1.0 for group in optimizer.param_groups]
    highest = HIGHEST_SGD if type(optimizer).__name__ == "SGD" else HIGHEST
    growth = (highest / LOWEST) ** (1 / (RANGE_STEPS - 1))
    curve: list[tuple[float, float]] = []
    for step in range(RANGE_STEPS):
        rate = LOWEST * growth**step
        for group, share in zip(optimizer.param_groups, shares):
            group["lr"] = rate * share
        optimizer.zero_grad(set_to_none=True)
        loss = calling(model, target.batches[step % len(target.batches)])
        curve.append((rate, float(loss.detach())))
        if not math.isfinite(curve[-1][1]) or _diverged(curve) or time.perf_counter() > until:
            break
        loss.backward()
        try:
            optimizer.step()
        except TypeError as problem:  # LBFGS wants a closure
            return {"reason": f"{type(optimizer).__name__} cannot be stepped once per batch: {problem}"}
    return {"curve": curve, "given": given, "optimizer": type(optimizer).__name__, "out_of_time": time.perf_counter() > until}


def _diverged(curve: list[tuple[float, float]]) -> bool:
    losses = _medians([loss for _, loss in curve])
    least = min(losses)
    return len(curve) > 10 and least > 0 and losses[-1] > DIVERGED * least and losses[-1] > losses[0]


def _medians(losses: list[float]) -> list[float]:
    """Each loss replaced by the median of itself and its neighbours, so that one hard batch makes no turn."""
    half = NEIGHBOURS // 2
    return [statistics.median(losses[max(at - half, 0) : at + half + 1]) for at in range(len(losses))]


def _turn(smooth: list[float], fall: float) -> int:
    """Where the loss stops falling: the lowest place before it has risen by a share of its whole fall."""
    lowest = 0
    for at, loss in enumerate(smooth):
        if loss < smooth[lowest]:
            lowest = at
        elif loss > smooth[lowest] + TURNED * fall and smooth[0] - smooth[lowest] > fall / 2:
            break
    return lowest


def rates_row(seen: dict[str, Any]) -> tuple[Row, list[Finding]]:
    """Which learning rate does the range test suggest, and is the optimizer's beyond the one at which the loss goes up?"""
    if "reason" in seen:
        return Row("learning-rate", "not examined", seen["reason"]), []
    curve = [(rate, loss) for rate, loss in seen["curve"] if math.isfinite(loss)]
    if seen["out_of_time"] or len(curve) < 10:
        return Row("learning-rate", "not examined", "the range test was not done in the time given", data=seen), []
    smooth = _medians([loss for _, loss in curve])
    fall = smooth[0] - min(smooth)
    if fall < LEAST_FALL * max(abs(smooth[0]), 1e-9):
        return Row("learning-rate", "not examined", "the loss did not fall at any rate, so the test says nothing", data=seen), []
    turn = _turn(smooth, fall)
    suggested = curve[turn][0] / 10
    up = next((curve[at][0] for at in range(turn, len(smooth)) if smooth[at] > smooth[0] + fall * TURNED), None)
    given = seen["given"]
    text = f"{seen['optimizer']}: suggested {number(suggested)}, a tenth of where the loss stops falling"
    text += f"; above its start from {number(up)}" if up else ""
    text += f"; yours is {number(given)}" if given is not None else ""
    data = {**seen, "suggested": suggested, "diverges_at": up}
    if given and up and given >= up:
        summary = f"At the optimizer's rate {number(given)} the loss has gone above its start: the range test suggests {number(suggested)}."
        cure = f"about {number(suggested)}, with warm-up"
        return Row("learning-rate", "found", text, ("learning-rate-too-high",), data), [
            Finding("learning-rate-too-high", summary, "warning", "", "", given, up, "per step", cure, "suspected")
        ]
    return Row("learning-rate", "ok", text, data=data), []


# --- the cached path -----------------------------------------------------------------------------------------------------
def generation(target: Target, seconds: float) -> dict[str, Any]:
    """Largest difference between the logits of the full forward and those with a cache; JSON-able. Runs inside a copy of the process."""
    model = target.model.eval()
    batch = target.batches[0]
    try:
        inputs = divided(batch)[0]
    except Exception:
        inputs = batch
    ids = next((t for t in tensors(inputs) if t.dtype == torch.int64 and t.dim() == 2 and t.shape[1] >= 4), None)
    config = getattr(model, "config", None)
    if ids is None:
        return {"reason": "the batch holds no token ids"}
    if not getattr(config, "use_cache", False) or getattr(config, "is_encoder_decoder", False) or not hasattr(model, "generate"):
        return {"reason": "the model has no cached path that is known to sickbay"}
    ids = ids[:2, :32].to(target.device)
    with torch.no_grad():
        full = model(input_ids=ids, use_cache=False).logits
        half = ids.shape[1] // 2
        out = model(input_ids=ids[:, :half], use_cache=True)
        if getattr(out, "past_key_values", None) is None:
            return {"reason": "the model gives no cache"}
        logits = [out.logits]
        for place in range(half, ids.shape[1]):
            out = model(input_ids=ids[:, place : place + 1], past_key_values=out.past_key_values, use_cache=True)
            logits.append(out.logits)
    cached = torch.cat(logits, 1)
    spread = float((full - full.mean(-1, keepdim=True)).std()) or 1.0
    difference = (full - cached).abs().amax((0, 2)) / spread
    return {"difference": float(difference.max()), "position": int(difference.argmax()), "prompt": half}


def generation_row(seen: dict[str, Any]) -> tuple[Row, list[Finding]]:
    """Does generation with a cache compute what the full forward does?"""
    if "reason" in seen:
        return Row("generation", "not examined", seen["reason"]), []
    text = f"cached and full logits differ by at most {number(seen['difference'])} of their spread"
    if seen["difference"] <= CACHED:
        return Row("generation", "ok", text, data=seen), []
    summary = f"Token by token with a cache the logits at position {seen['position']} differ from the full forward's "
    summary += f"by {number(seen['difference'])} of their spread."
    finding = Finding(
        "generation-path-mismatch", summary, "critical", f"position {seen['position']}", "", seen["difference"], CACHED, CACHED.unit,
        "positions, mask or cache of the incremental path",
    )  # fmt: skip
    return Row("generation", "found", text, ("generation-path-mismatch",), seen), [finding]


# --- memory --------------------------------------------------------------------------------------------------------------
def memory(target: Target, calling: Calling) -> dict[str, Any]:
    """Bytes of weights, gradients, optimizer state and what a step keeps for backward; JSON-able. Runs inside a copy of the process."""
    model = target.model.train()
    own = {id(t) for t in (*model.parameters(), *model.buffers())}
    kept: dict[tuple[int, int], int] = {}

    def pack(tensor: Tensor) -> Tensor:
        if id(tensor) not in own and tensor.data_ptr():
            storage = tensor.untyped_storage()
            kept[(storage.data_ptr(), storage.nbytes())] = storage.nbytes()
        return tensor

    weights = {p.untyped_storage().data_ptr(): p.nbytes for p in model.parameters()}
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        loss = calling(model, target.batches[0])
    activations = sum(size for (place, _), size in kept.items() if place not in weights)
    loss.backward()
    gradients = sum(p.grad.nbytes for p in model.parameters() if p.grad is not None and not p.grad.is_sparse)
    optimizer = target.optimizer or torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.0)
    if not optimizer.state:
        for group in optimizer.param_groups:
            group["lr"] = 0.0
        optimizer.step()
    state = sum(t.nbytes for values in optimizer.state.values() for t in tensors(dict(values)))
    return {
        "weights": sum(weights.values()) + sum(b.nbytes for b in model.buffers()),
        "gradients": gradients,
        "optimizer": state,
        "activations": activations,
        "rows": rows_of(target.batches[0]),
        "available": _available(target.device),
        "device": target.device.type,
    }


def _available(device: torch.device) -> int:
    if device.type == "cuda":
        return int(torch.cuda.get_device_properties(device).total_memory)
    import psutil

    return int(psutil.virtual_memory().total)


def memory_row(seen: dict[str, Any]) -> tuple[Row, list[Finding]]:
    """What fills memory in one step, and how many examples would fit at once?"""
    fixed = seen["weights"] + seen["gradients"] + seen["optimizer"]
    total = fixed + seen["activations"]
    parts = ", ".join(f"{name} {size(seen[name])}" for name in ("weights", "gradients", "optimizer", "activations"))
    text = f"one step of {seen['rows']} examples keeps {size(total)} ({parts}) of {size(seen['available'])}"
    room = FITS * seen["available"] - fixed
    if seen["rows"] and seen["activations"] and room > 0:
        text += f"; about {int(room / (seen['activations'] / seen['rows'])):,} examples fit"
    return Row("memory", "ok", text, data={**seen, "total": total}), []


def size(count: float) -> str:
    """Bytes in the largest unit that leaves a number of at least 1."""
    for unit in ("B", "KiB", "MiB", "GiB"):
        if count < 1024 or unit == "GiB":
            return f"{count:.3g} {unit}" if count < 1000 else f"{count:.0f} {unit}"
        count /= 1024
    raise AssertionError("unreachable: the last unit returns")
