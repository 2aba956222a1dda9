"""Can the model learn ten examples by heart? If not, why not.

The target is not zero but what those ten leave open: where equal contexts go on differently, no model can do better than the
entropy of their continuations.
"""

from __future__ import annotations

import contextlib
import copy
import math
import os
import time
from collections import Counter, defaultdict
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from sickbay.checklist.calling import IGNORED, Calling, first_rows, ids_and_targets, outputs_of, rows_of
from sickbay.checklist.result import Finding, Row
from sickbay.checklist.target import Target, tensors
from sickbay.core.diagnosis import Threshold, number

EXAMPLES = 10
STEPS = 400
TRIAL_STEPS = 20
RATES = (3e-3, 1e-3, 3e-4)  # tried in turn; AdamW's usual decade for models of this kind
CLIP = 1.0
CLOSED = Threshold(
    0.9, "share of the way", source="the guide: the loss on ten examples should go near its floor; the last tenth only takes time"
)
OPEN = Threshold(
    0.5, "share of the targets' entropy", source="inputs that explain less than half of ten examples' targets cannot be told apart"
)
STUCK = Threshold(0.02, "share of the way in the last fifth", source="a loss that still falls by more needs time, not a cure")
BOUNDED = Threshold(1.0001, "logit", source="the range of softmax, sigmoid and tanh, and a rounding error")


@dataclass
class Course:
    """How the loss went. `losses`: nats per step; `norm`: the last gradient norm."""

    rate: float
    losses: list[float] = field(default_factory=list)
    norm: float = 0.0

    @property
    def last(self) -> float:
        return min(self.losses[-3:], default=math.inf)


def overfit(target: Target, calling: Calling, seconds: float, terminal: int | None) -> dict[str, Any]:
    """The losses of training on ten examples with dropout off, and what bounds them; JSON-able. Runs inside a copy of the process."""
    until = time.perf_counter() + seconds
    batches = ten(target.batches)
    model = target.model.train()
    smoothing = _Smoothing()
    with smoothing:
        quiet = _without_dropout(model, calling, batches[0])
        _, outputs = outputs_of(model, calling, batches[0])
    floor = floor_of(batches)
    start = copy.deepcopy({name: value.detach().clone() for name, value in model.state_dict().items()})
    courses: list[Course] = []
    with _bar(terminal) as show:
        for rate in RATES:
            model.load_state_dict(start)
            course = Course(rate)
            courses.append(course)
            # Each trial may take a share of the time, so that the longest run has the most of it.
            _train(model, calling, batches, course, TRIAL_STEPS, time.perf_counter() + seconds / 8, lambda done, value: None)
            if not math.isfinite(course.losses[0]) or course.norm == 0:
                break
        best = min(courses, key=lambda course: course.last if math.isfinite(course.last) else math.inf)
        model.load_state_dict(start)
        full = Course(best.rate)
        reached = floor["floor"] + smoothing.floor
        _train(model, calling, batches, full, STEPS, until, show, reached)
    with torch.no_grad():
        _, after = outputs_of(model, calling, batches[0])
    return {
        **floor,
        "target": reached,
        "smoothing": smoothing.value,
        "examples": sum(rows_of(batch) for batch in batches),
        "losses": full.losses,
        "rate": best.rate,
        "norm": full.norm,
        "trials": {str(course.rate): course.last for course in courses},
        "quiet": quiet,
        "in_time": len(full.losses) >= STEPS or full.last <= _goal(full.losses[0], reached),
        "bounds": _bounds(after),
        "classes": max((t for t in after if t.dim() >= 2), key=Tensor.numel).shape[-1] if any(t.dim() >= 2 for t in after) else 0,
        "moves": _moves(outputs, after),
        "parameters": sum(p.numel() for p in model.parameters() if p.requires_grad),
    }


def ten(batches: list[Any]) -> list[Any]:
    """Ten examples, in as few batches as they come in."""
    left, found = EXAMPLES, []
    for batch in batches:
        rows = rows_of(batch)
        if rows and left > 0:
            found.append(first_rows(batch, min(rows, left)))
            left -= min(rows, left)
    return found or batches[:1]


def _train(
    model: nn.Module, calling: Calling, batches: list[Any], course: Course, steps: int, until: float, show: Any, reached: float = -math.inf
) -> None:
    parameters = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=course.rate, weight_decay=0.0)
    for step in range(steps):
        optimizer.zero_grad(set_to_none=True)
        total = 0.0
        for batch in batches:
            loss = calling(model, batch)
            (loss / len(batches)).backward()
            total += float(loss.detach()) / len(batches)
        course.losses.append(total)
        course.norm = float(nn.utils.clip_grad_norm_(parameters, CLIP))
        show(step + 1, total)
        if not math.isfinite(total) or not math.isfinite(course.norm) or course.norm == 0 or total <= _goal(course.losses[0], reached):
            return
        optimizer.step()
        if time.perf_counter() > until:
            return


def _goal(first: float, reached: float) -> float:
    return reached + (1 - CLOSED) * 0.5 * max(first - reached, 0.0)


def _without_dropout(model: nn.Module, calling: Calling, batch: Any) -> bool:
    """Dropout is off, batch-norm as in training; True if two passes over one batch then agree."""
    for module in model.modules():
        if isinstance(module, nn.modules.dropout._DropoutNd):
            module.eval()
    if _agree(model, calling, batch):
        return True
    model.eval()
    with contextlib.suppress(Exception):
        if calling(model, batch).requires_grad:
            return _agree(model, calling, batch)
    model.train()
    return False


def _agree(model: nn.Module, calling: Calling, batch: Any) -> bool:
    values = []
    with torch.no_grad():
        for seed in (1, 2):
            torch.manual_seed(seed)
            values.append(float(calling(model, batch)))
    return values[0] == values[1] or not all(map(math.isfinite, values))


class _Smoothing(TorchFunctionMode):
    """Sees how much cross-entropy smooths its labels, and the loss that the best possible model has then."""

    value = 0.0
    floor = 0.0

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if getattr(func, "__name__", "") == "cross_entropy" and 0 < kwargs.get("label_smoothing", 0.0) < 1:
            logits = args[0] if args else kwargs["input"]
            self.value = kwargs["label_smoothing"]
            classes = logits.shape[1] if logits.dim() > 1 else logits.shape[0]
            other = self.value / classes
            right = 1 - self.value + other
            self.floor = -right * math.log(right) - (classes - 1) * other * math.log(other)
        return func(*args, **kwargs)


def floor_of(batches: list[Any]) -> dict[str, Any]:
    """`floor`: entropy of the targets given their contexts, nats per target; `marginal`: without them; 0 and None where unknown."""
    contexts: dict[Any, Counter[int]] = defaultdict(Counter)
    every: Counter[int] = Counter()
    for batch in batches:
        for context, value in _pairs(batch):
            contexts[context][value] += 1
            every[value] += 1
    if not every:
        return {"floor": 0.0, "marginal": None, "targets": 0}
    total = sum(every.values())
    return {
        "floor": sum(_nats(counter) for counter in contexts.values()) / total,
        "marginal": _nats(every) / total,
        "targets": total,
    }


def _pairs(batch: Any) -> Iterator[tuple[Any, int]]:
    """Each counted target with all that a model may know of it: the tokens up to it, or the whole example."""
    sequence = ids_and_targets(batch)
    if sequence is not None and _is_next_token(*sequence):
        for ids, targets in zip(sequence[0].tolist(), sequence[1].tolist()):
            seen = 0
            for place, value in enumerate(targets):
                seen = hash((seen, ids[place]))
                if value != IGNORED:
                    yield seen, value
        return
    from sickbay.checklist.calling import CallError, divided

    try:
        inputs, targets = divided(batch)
    except CallError:
        return
    if not isinstance(targets, Tensor) or targets.is_floating_point() or not targets.dim() or targets.shape[0] != rows_of(batch):
        return
    given = [t for t in tensors(inputs) if t.dim() and t.shape[0] == len(targets)]
    for row in range(len(targets)):
        content = tuple(t[row].contiguous().numpy(force=True).tobytes() for t in given if t.dtype != torch.bfloat16)
        for place, value in enumerate(targets[row].reshape(-1).tolist()):
            if value != IGNORED:
                yield (content, place), value


def _is_next_token(ids: Tensor, targets: Tensor) -> bool:
    ahead, here = ids[:, 1:], targets[:, :-1]
    counted = here != IGNORED
    return bool(counted.any()) and float((ahead[counted] == here[counted]).float().mean()) > 0.9


def _nats(counter: Counter[int]) -> float:
    total = sum(counter.values())
    return -sum(count * math.log(count / total) for count in counter.values())


def _bounds(outputs: list[Tensor]) -> list[float] | None:
    """Least and largest value of the largest output; None if it is no table of classes."""
    logits = max((t for t in outputs if t.dim() >= 2 and t.shape[-1] > 1), key=lambda t: t.numel(), default=None)
    return [float(logits.min()), float(logits.max())] if logits is not None else None


def _moves(before: list[Tensor], after: list[Tensor]) -> bool:
    """True if the outputs tell examples apart or changed at all."""
    return any(a.shape != b.shape or not torch.equal(a, b) for a, b in zip(before, after))


@contextlib.contextmanager
def _bar(terminal: int | None) -> Iterator[Any]:
    """A progress bar on the terminal, gone when it is done; without one nothing is shown."""
    if terminal is None:
        yield lambda done, loss: None
        return
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn

    with os.fdopen(os.dup(terminal), "w", encoding="utf-8") as stream:
        columns = (TextColumn("overfit ten examples"), BarColumn(), MofNCompleteColumn(), TextColumn("loss {task.fields[loss]:.3f}"))
        with Progress(*columns, console=Console(file=stream, force_terminal=True), transient=True) as progress:
            task = progress.add_task("overfit", total=STEPS, loss=math.nan)
            yield lambda done, loss: progress.update(task, completed=done, loss=loss)


# --- the verdict ---------------------------------------------------------------------------------------------------------
def overfit_row(seen: dict[str, Any], found: set[str]) -> tuple[Row, list[Finding]]:
    """Did it learn them, and if not, why not? `found`: conditions that are known already and may be the reason."""
    losses, target = seen["losses"], seen["target"]
    first, last = losses[0], min(losses[-3:])
    data = {key: seen[key] for key in ("losses", "target", "floor", "marginal", "rate", "trials", "examples", "norm")}
    went = f"loss {number(first)} to {number(last)} in {len(losses)} steps at AdamW {number(seen['rate'])}; "
    went += f"their conditional entropy is {number(target)}"

    def failed(condition: str, why: str, severity: Any, cure: str, certainty: str = "confirmed") -> tuple[Row, list[Finding]]:
        finding = Finding(
            condition, f"Ten examples cannot be learnt: {why} ({went}).", severity, "", "", last, target, "nats", cure, certainty
        )
        return Row("overfit", "found", f"{why}; {went}", (condition,), data), [finding]

    if seen["marginal"] and seen["marginal"] > 0.1 and seen["floor"] > OPEN * seen["marginal"] and seen["targets"] > 2:
        why = f"equal inputs have different targets: the inputs leave {seen['floor'] / seen['marginal']:.0%} of the targets' entropy open"
        return failed("unlearnable-data", why, "critical", "look at what the data pipeline puts into the inputs")
    if not math.isfinite(last):
        return failed("cannot-overfit", "the loss becomes NaN or infinite", "critical", "see the finite exam; lower the learning rate")
    closed = (first - last) / (first - target) if first > target + 1e-9 else 1.0
    data["closed"] = closed
    if closed >= CLOSED or last <= target + 0.05:
        return Row("overfit", "ok", went, data=data), []
    if seen["norm"] == 0 or (not seen["moves"] and len(losses) > 1):
        return failed("missing-gradient", "no gradient arrives", "critical", "reconnect the graph between loss and weights")
    low, high = seen["bounds"] or (-math.inf, math.inf)
    if low >= -BOUNDED and high <= BOUNDED and seen["marginal"] is not None:
        what = "softmax or sigmoid" if low >= 0 else "tanh"
        why = f"the logits stay between {low:.2f} and {high:.2f}, as after a {what}"
        return failed("squashed-logits", why, "warning", "give the loss raw logits", "likely")
    if not seen["quiet"]:
        return Row("overfit", "not examined", f"the model is random even with dropout off, so its loss has no floor; {went}", data=data), []
    fifth = max(len(losses) // 5, 1)
    late = (min(losses[-2 * fifth : -fifth] or losses[:1]) - last) / max(first - target, 1e-9)
    if late > STUCK or (not seen["in_time"] and closed > 0.1):
        return Row("overfit", "not examined", f"not done in the time given, and still falling; {went}", data=data), []
    if first - last < 0 or closed < STUCK:
        if not seen["in_time"] and len(losses) < TRIAL_STEPS * 3:
            return Row("overfit", "not examined", f"too few steps in the time given; {went}", data=data), []
        return failed("cannot-overfit", "the loss does not fall at any learning rate tried", "warning", _blocked(found), "likely")
    lowest = math.log(math.e + seen["classes"] - 1) - 1 if seen["classes"] > 2 and seen["marginal"] is not None else -math.inf
    if 0 <= last - lowest <= (1 - CLOSED) * (first - lowest):
        why = f"the loss stops at {number(last)}, just above the {number(lowest)} that is the least with a second softmax in it"
        return failed("squashed-logits", why, "warning", "give the loss raw logits", "likely")
    if seen["marginal"] is None:
        return Row("overfit", "not examined", f"the lowest reachable loss of these targets is not known; {went}", data=data), []
    if seen["parameters"] < seen["targets"]:
        why = f"{seen['parameters']:,} trainable parameters for {seen['targets']:,} targets are too few"
        return failed("model-too-small", why, "note", "a larger model", "likely")
    return failed("cannot-overfit", f"it stops at {closed:.0%} of the way", "note", _blocked(found), "suspected")


def _blocked(found: set[str]) -> str:
    known = ", ".join(sorted(found - {"cannot-overfit"}))
    return (
        f"cure {known} first"
        if known
        else "a part of the input does not reach the output, or the loss has a floor of its own: compare both by hand"
    )
