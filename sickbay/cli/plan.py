"""Works out memory, size, batch and schedule for a model, a data set and a machine, without loading a weight.

    sickbay plan llama-7b --batch 8 --memory 80GiB
    sickbay plan path/to/config.json --length 1024 --batch 16 --tokens 2e9
    sickbay plan mycode.models:build --batch 32 --length 256
    sickbay plan --dim 512 --layers 8 --vocab 32000 --memory 24GiB --batch-tokens 524288
    sickbay plan llama-7b --batch 64 --processes 8 --parallel fsdp --memory 80GiB
    sickbay plan --tokens 5e6

Bytes per part are those of one training step; the peak is the most that is alive at once. Activations are counted on tensors without
storage, so they are the kernels' own; workspaces and fragmentation come on top (`--memory` is planned to 92 %).
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import re
from typing import Any

from sickbay.core import plan, shares
from sickbay.core.errors import UsageError

NAME = "plan"
DIMENSIONS = ("dim", "layers", "heads", "ffn", "vocab", "context")
DEFAULT_BATCH = 8
_UNITS = {
    "": 1,
    "b": 1,
    "k": 1e3,
    "kb": 1e3,
    "kib": 2**10,
    "m": 1e6,
    "mb": 1e6,
    "mib": 2**20,
    "g": 1e9,
    "gb": 1e9,
    "gib": 2**30,
    "tib": 2**40,
}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The model, the step, the machine, the data."""
    parser.add_argument("target", nargs="?", default="", metavar="MODEL", help="preset, config.json or its folder, or module:function")
    for name in DIMENSIONS:
        parser.add_argument(
            f"--{name}", type=int, help=argparse.SUPPRESS if name != "dim" else "dimensions: --dim --layers --heads --ffn --vocab --context"
        )
    parser.add_argument("--batch", type=int, default=0, help=f"rows of a batch (default {DEFAULT_BATCH})")
    parser.add_argument("--length", type=int, default=0, help="positions of a row (default: the model's context)")
    parser.add_argument("--optimizer", default="adamw", choices=sorted(plan.STATE_COPIES), help="what keeps state (default adamw)")
    parser.add_argument("--memory", default="", metavar="SIZE", help="memory to fit into, as 24GiB or 80GB")
    parser.add_argument("--tokens", default="", metavar="N", help="tokens of the data set, as 5e6")
    parser.add_argument("--batch-tokens", default="", metavar="N", help="tokens of an optimizer step, as 524288")
    parser.add_argument("--epochs", type=float, default=1.0, help="passes over the data (default 1)")
    parser.add_argument("--processes", type=int, default=0, metavar="N", help="share the step between N processes, a GPU each")
    parser.add_argument("--parallel", default="", choices=shares.KINDS, help="how: ddp, fsdp or tp (all three)")
    parser.add_argument("--json", action="store_true", help="print the plan as JSON")


def main(args: argparse.Namespace) -> int:
    """The plan is on stdout; returns 0. Raises UsageError for what is missing or cannot be."""
    tokens = _number("--tokens", args.tokens)
    batch_tokens = int(_number("--batch-tokens", args.batch_tokens))
    limit = _size(args.memory)
    for name in ("batch", "length", "processes"):
        if getattr(args, name) < 0:
            raise UsageError(f"--{name} is {getattr(args, name)}; it must be at least 1")
    if args.parallel and not args.processes:
        raise UsageError(f"--parallel {args.parallel} needs --processes N beside it")
    if args.epochs <= 0:
        raise UsageError(f"--epochs is {args.epochs}; it must be above 0")
    given = {name: getattr(args, name) for name in DIMENSIONS if getattr(args, name) is not None}
    if given and args.target:
        raise UsageError(f"{args.target} and --{next(iter(given))} both describe a model: give one of them")
    if given and "dim" not in given:
        raise UsageError(f"--{next(iter(given))} needs --dim beside it")
    if not given and not args.target and not tokens:
        raise UsageError("nothing to plan: give a model (preset, config, module:function, --dim ...) or --tokens")
    result: dict[str, Any] = {}
    if given or args.target:
        result["model"], result["step"], result["fits"], result["shares"] = _model(args, given, limit, batch_tokens)
    if tokens:
        result["data"] = _data(tokens, result.get("model"))
    if tokens and "model" in result:
        result["schedule"] = _schedule(tokens * args.epochs, batch_tokens or result["step"]["tokens"], result["model"]["parameters"])
    if args.json:
        print(json.dumps(result, indent=2))
    else:
        print("\n".join(_lines(result, limit)))
    return 0


def _model(args: argparse.Namespace, given: dict[str, int], limit: float, batch_tokens: int) -> tuple[Any, Any, Any, Any]:
    from sickbay.blueprint import blueprint

    rows = args.batch or DEFAULT_BATCH
    found = blueprint(args.target, rows, args.length, args.optimizer, given or None)
    parts, batch = found.parts, rows
    if batch_tokens:
        batch = max(1, round(batch_tokens / found.length))
    model = {
        "name": found.name,
        "parameters": found.parameters,
        "trainable": found.trainable,
        "embedding_share": found.embedding / max(found.parameters, 1),
        "layers": found.layers,
        "width": found.width,
    }
    every = plan.best_segment(parts)
    step = {
        "rows": rows,
        "length": found.length,
        "tokens": (batch if batch_tokens else rows) * found.length,
        "weights": parts.weights,
        "gradients": parts.gradients,
        "optimizer": parts.optimizer,
        "activations": parts.activations,
        "activations_per_block": max(parts.blocks, default=0.0),
        "logits": parts.logits,
        "outputs": parts.outputs,
        "peak": parts.peak,
        "checkpoint_every": every,
        "peak_checkpointed": parts.checkpointed(every).peak if every else parts.peak,
    }
    kinds = [args.parallel] if args.parallel else list(shares.KINDS)
    held = None
    if args.processes:
        held = [dataclasses.asdict(shares.share(kind, parts, found.weights, args.processes, rows)) for kind in kinds]
    if not limit:
        return model, step, None, held
    ways = [dataclasses.asdict(way) | {"text": str(way)} for way in plan.fits(parts, batch, limit)]
    return model, step, {"memory": limit, "batch": batch, "ways": ways}, held


def _data(tokens: float, model: dict[str, Any] | None) -> dict[str, Any]:
    small, large = plan.guide_size(tokens)
    guide = [plan.body_parameters(width, layers) for width, layers in (small, large)]
    optimal = plan.compute_optimal(tokens)
    data: dict[str, Any] = {
        "tokens": tokens,
        "compute_optimal_parameters": optimal,
        "guide": {"from": small, "to": large, "parameters": guide},
        "guide_over_optimal": guide[0] / optimal,
    }
    if model is not None:
        data["tokens_per_parameter"] = tokens / max(model["parameters"], 1)
    return data


def _schedule(tokens: float, step_tokens: int, parameters: int) -> dict[str, Any]:
    steps = max(1, round(tokens / step_tokens))
    made = plan.schedule(steps, plan.peak_learning_rate(parameters))
    at = {str(step): made.at(step) for step in sorted({0, made.warmup, steps // 2, steps})}
    return {
        "step_tokens": step_tokens,
        **dataclasses.asdict(made),
        "learning_rate_at": at,
        "flops": plan.FLOPS_PER_TOKEN * parameters * tokens,
    }


def _lines(result: dict[str, Any], limit: float) -> list[str]:
    """The plan as people read it."""
    lines: list[str] = []
    if "model" in result:
        model, step = result["model"], result["step"]
        share = f"embedding and head {model['embedding_share']:.0%}"
        lines += [model["name"], f"  {model['parameters']:,} parameters in {model['layers']} blocks, {share}", ""]
        lines += [f"a step of {step['rows']} rows x {step['length']} positions"]
        lines += [f"  {name:<12} {plan.gibibytes(step[name]):>11}" for name in ("weights", "gradients", "optimizer", "activations")]
        lines += [f"  {'':<12} {plan.gibibytes(step['activations_per_block']):>11} of them in each block"]
        lines += [f"  {'logits':<12} {plan.gibibytes(step['logits']):>11} a copy", f"  {'peak':<12} {plan.gibibytes(step['peak']):>11}"]
        if step["checkpoint_every"]:
            every = "block" if step["checkpoint_every"] == 1 else f"{step['checkpoint_every']} blocks"
            lines += [f"  {'':<12} {plan.gibibytes(step['peak_checkpointed']):>11} with checkpointing every {every}"]
    if result.get("shares"):
        lines += ["", *_share_lines(result["shares"], limit)]
    fits = result.get("fits")
    if fits:
        ways = [f"  {way['text']}" for way in fits["ways"]]
        refused = ["  nothing: not even one row fits, in any of these ways; shard the model or use a smaller one"]
        lines += ["", f"batches of {fits['batch']} rows in {plan.gibibytes(limit)}, the gentlest first", *(ways or refused)]
    if "data" in result:
        lines += ["", *_data_lines(result["data"])]
    if "schedule" in result:
        made = result["schedule"]
        rates = ", ".join(f"step {step}: {rate:.2e}" for step, rate in made["learning_rate_at"].items())
        lines += ["", f"schedule: {made['steps']:,} steps of {made['step_tokens']:,} tokens, {made['flops']:.1e} FLOP"]
        lines += [f"  linear warm-up over {made['warmup']} steps, cosine to {made['floor']:.1e}, clamped there ({rates})"]
        lines += ["  the peak is a first guess by size: a range test settles it"]
    return lines


def _share_lines(held: list[dict[str, Any]], limit: float) -> list[str]:
    columns = ("weights", "gradients", "optimizer", "gathered", "activations", "logits", "peak")
    lines = [f"on each of {held[0]['processes']} processes", f"  {'':<5}{'rows':>6}" + "".join(f"{name:>12}" for name in columns)]
    for one in held:
        over = "  too much" if limit and one["peak"] > limit * plan.HEADROOM else ""
        lines += [f"  {one['kind']:<5}{one['rows']:>6}" + "".join(f"{plan.gibibytes(one[name]):>12}" for name in columns) + over]
    return lines


def _data_lines(data: dict[str, Any]) -> list[str]:
    guide, optimal = data["guide"], data["compute_optimal_parameters"]
    low, high = guide["parameters"]
    (w1, l1), (w2, l2) = guide["from"], guide["to"]
    lines = [
        f"a data set of {data['tokens']:,.0f} tokens",
        f"  compute-optimal for one pass ({plan.TOKENS_PER_PARAMETER:.0f} tokens a parameter): {optimal:,.0f} parameters",
        f"  by table: width {w1}, {l1} layers to width {w2}, {l2} layers = {low:,.0f} to {high:,.0f} parameters in the blocks",
    ]
    if data["guide_over_optimal"] > 2:
        lines += [
            f"  they disagree by {data['guide_over_optimal']:,.0f} x: the table's models learn such a set by heart within a few epochs;",
            "  start small and grow while validation loss still falls",
        ]
    if "tokens_per_parameter" in data:
        lines += [f"  this model: {data['tokens_per_parameter']:.2g} tokens a parameter"]
    return lines


def _size(text: str) -> float:
    if not text:
        return 0.0
    found = re.fullmatch(r"\s*([\d.]+)\s*([A-Za-z]*)\s*", text)
    if not found or found[2].lower() not in _UNITS or found[1].count(".") > 1 or found[1] == "." or float(found[1]) <= 0:
        raise UsageError(f"--memory is {text!r}; it must be a size such as 24GiB or 80GB")
    return float(found[1]) * _UNITS[found[2].lower()]


def _number(option: str, text: str) -> float:
    if not text:
        return 0.0
    try:
        value = float(text.replace("_", ""))
    except ValueError:
        value = -1.0
    if not 1 <= value < 1e18:
        raise UsageError(f"{option} is {text!r}; it must be a count such as 5e6")
    return value
