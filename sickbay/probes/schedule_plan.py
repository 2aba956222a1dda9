"""Reads from a torch scheduler what it was built for: after how many of its own steps the warm-up ends, and the whole plan."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Sequence
from typing import Any

from torch.optim import lr_scheduler as torch_schedulers

from sickbay.core.rates import Plan, plan_of_function

AskFunction = Callable[[Callable[[int], Any]], Plan]

_RISE = 0.9  # of the final factor: what begins below it is a warm-up


def parts_of(scheduler: Any) -> Sequence[Any]:
    """The schedulers that `scheduler` joins; empty for a plain one."""
    parts = getattr(scheduler, "_schedulers", None)
    return parts if isinstance(parts, (list, tuple)) else ()


def plan_of(scheduler: Any, ask: AskFunction) -> Plan:
    """What `scheduler` was built for. A function of the user's is handed to `ask`, which must see to it that calling it changes nothing."""
    name = type(scheduler).__name__
    if type(scheduler).__module__ != torch_schedulers.__name__:
        return Plan("unknown")
    if name == "ReduceLROnPlateau":
        return Plan("metric")
    if name in ("CyclicLR", "CosineAnnealingWarmRestarts"):
        return Plan("restarts")
    if name == "SequentialLR":
        return _one_after_another(scheduler, [plan_of(part, ask) for part in parts_of(scheduler)])
    if name == "ChainedScheduler":
        return _at_once([plan_of(part, ask) for part in parts_of(scheduler)])
    if name == "LambdaLR":
        return _of_function(scheduler.lr_lambdas[0], ask)
    return _of_numbers(name, scheduler)


def _of_numbers(name: str, scheduler: Any) -> Plan:
    """The plan of the classes that keep it in plain attributes."""
    if name == "CosineAnnealingLR":
        return Plan("decay", int(scheduler.T_max), 0)
    if name == "OneCycleLR":
        return Plan("decay", int(scheduler.total_steps), math.ceil(scheduler._schedule_phases[0]["end_step"]))
    if name == "PolynomialLR":
        return Plan("decay", int(scheduler.total_iters), 0)
    if name == "LinearLR":
        rising = scheduler.start_factor < _RISE * scheduler.end_factor
        return Plan("constant", None, int(scheduler.total_iters)) if rising else Plan("decay", int(scheduler.total_iters), 0)
    if name == "ConstantLR":
        return Plan("constant", None, int(scheduler.total_iters) if scheduler.factor < _RISE else 0)
    if name == "MultiStepLR" and scheduler.milestones:
        return Plan("decay", int(max(scheduler.milestones)), 0)
    return Plan("decay" if name in ("StepLR", "ExponentialLR") else "unknown", None, 0)


def _one_after_another(scheduler: Any, plans: list[Plan]) -> Plan:
    kinds = {plan.kind for plan in plans}
    if "restarts" in kinds:
        return Plan("restarts")
    if kinds & {"metric", "unknown"}:
        return Plan("unknown")
    starts = [0, *map(int, scheduler._milestones)]
    # A first part that rises is meant to last until the second begins, whatever its own length.
    return Plan(plans[-1].kind, starts[-1] + plans[-1].length if plans[-1].length else None, starts[1] if plans[0].warmup else 0)


def _at_once(plans: list[Plan]) -> Plan:
    kinds = {plan.kind for plan in plans}
    if kinds & {"metric", "restarts", "unknown"}:
        return Plan("restarts" if "restarts" in kinds else "metric" if "metric" in kinds else "unknown")
    lengths = [plan.length for plan in plans if plan.length]
    return Plan("decay" if "decay" in kinds else "constant", max(lengths, default=None), max(plan.warmup or 0 for plan in plans))


def _of_function(function: Any, ask: AskFunction) -> Plan:
    """The plan behind a function of the step; transformers' own are told by their arguments, and asking them changes nothing."""
    if not (isinstance(function, functools.partial) and str(getattr(function.func, "__module__", "")).startswith("transformers.")):
        return ask(function)
    plan = plan_of_function(function)
    total, rise = function.keywords.get("num_training_steps"), function.keywords.get("num_warmup_steps", plan.warmup)
    return Plan(plan.kind, int(total) if total else plan.length, int(rise) if rise is not None else None)
