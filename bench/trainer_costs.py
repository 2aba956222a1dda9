"""Memory and time of the remedies: how a step's memory grows with layers and context; what recomputing, accumulation and bf16 change.

Memory is what torch's allocator says it gave out and took back, event by event: the peak is exact and the same on every machine.
"""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Callable
from functools import partial

import results
import torch
from torch import Tensor
from torch.profiler import ProfilerActivity, profile
from trainer_loops import GPT

from sickbay.reference.models.blocks import Attention
from sickbay.reference.models.config import Config
from sickbay.reference.models.model import Transformer
from sickbay.reference.settings.recipe import Precision, Recompute
from sickbay.reference.training.loss import next_token_loss, token_shares
from sickbay.reference.training.precision import autocast
from sickbay.reference.training.recompute import recompute

KINDS: tuple[Recompute, ...] = ("none", "block", "sqrt")
LAYERS, CONTEXTS = (4, 9, 16), (64, 128, 256, 512)
WIDTH, HEADS, ROWS = 64, 4, 2
TIMED = Config(dim=128, num_layers=9, num_heads=4, context=128, **GPT)
TIMED_ROWS = 16
PARTS = 4  # micro-batches of the accumulated step


def peak_bytes(work: Callable[[], object]) -> int:
    """The most bytes that torch's CPU allocator held at once during `work` beyond what it held before."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiled:
        work()
    kineto = profiled.profiler
    assert kineto is not None
    events = [event for event in kineto.kineto_results.events() if event.name() == "[memory]"]
    held = most = 0
    for event in sorted(events, key=lambda event: event.start_ns()):
        held += event.nbytes()
        most = max(most, held)
    return most


def written_out(query_BHTK: Tensor, key_BHSK: Tensor, value_BHSK: Tensor, visible_B1TS: Tensor | None, dropout: float) -> Tensor:
    """Causal attention whose whole matrix of weights is in memory, as the formula is written."""
    T = query_BHTK.shape[2]
    scores_BHTT = query_BHTK @ key_BHSK.mT / math.sqrt(query_BHTK.shape[-1])
    later_TT = torch.ones(T, T, dtype=torch.bool).triu(1)
    return scores_BHTT.masked_fill(later_TT, -math.inf).softmax(-1) @ value_BHSK


def needed(num_layers: int, context: int, kind: Recompute, fused: bool) -> int:
    """Peak bytes of forward and backward of full rows, the gradients already in place."""
    torch.manual_seed(0)
    model = Transformer(Config(dim=WIDTH, num_layers=num_layers, num_heads=HEADS, context=context, **GPT))
    recompute(model, kind)
    if not fused:
        for module in model.modules():
            if isinstance(module, Attention):
                module.attend = written_out
    ids = torch.randint(model.config.vocab_size, (ROWS, context))
    next_token_loss(model, ids, ids).backward()
    return peak_bytes(lambda: next_token_loss(model, ids, ids).backward())


def growth(sizes: tuple[int, ...], bytes_kept: list[int]) -> float:
    """The exponent with which the bytes grow from the second-largest to the largest size."""
    return math.log(bytes_kept[-1] / bytes_kept[-2]) / math.log(sizes[-1] / sizes[-2])


def memory() -> str:
    rows = []
    for kind, fused in (*((kind, True) for kind in KINDS), ("none", False)):
        by_layers = [needed(layers, CONTEXTS[1], kind, fused) for layers in LAYERS]
        by_context = [needed(LAYERS[1], context, kind, fused) for context in CONTEXTS]
        rows.append(
            [
                kind if fused else "none, attention written out",
                ", ".join(f"{count / 2**20:.1f}" for count in by_layers),
                f"L^{growth(LAYERS, by_layers):.2f}",
                ", ".join(f"{count / 2**20:.1f}" for count in by_context),
                f"N^{growth(CONTEXTS, by_context):.2f}",
            ]
        )
    heading = ["recompute", f"MiB with {', '.join(map(str, LAYERS))} layers", "grows as"]
    heading += [f"MiB with context {', '.join(map(str, CONTEXTS))}", "grows as"]
    told = f"{WIDTH} wide, {ROWS} rows, {CONTEXTS[1]} context or {LAYERS[1]} layers where the other grows"
    return f"Peak memory of forward and backward beside weights and gradients ({told}):\n\n{results.table(heading, rows)}"


def measure(rounds: int) -> str:
    """Memory as it grows, then memory and time of each remedy beside the plain step, all in turn in each of `rounds` rounds."""
    torch.manual_seed(0)
    model = Transformer(TIMED)
    ids = torch.randint(TIMED.vocab_size, (TIMED_ROWS, TIMED.context))

    def step(parts: int = 1, kind: Recompute = "none", precision: Precision = "fp32") -> None:
        recompute(model, kind)
        cycle = [(each, each) for each in ids.chunk(parts)]
        for (rows, targets), share in zip(cycle, token_shares(cycle)):
            with autocast(precision, "cpu"):
                loss = next_token_loss(model, rows, targets)
            (loss * share).backward()

    ways: dict[str, Callable[[], None]] = {
        "plain": step,
        "recompute each block": partial(step, kind="block"),
        "recompute sqrt(L) segments": partial(step, kind="sqrt"),
        f"{PARTS} micro-batches": partial(step, PARTS),
        "bf16 autocast": partial(step, precision="bf16"),
    }
    step()  # gradients are in place
    bytes_of = {name: peak_bytes(way) for name, way in ways.items()}
    taken: dict[str, list[float]] = {name: [] for name in ways}
    for _ in range(rounds):
        for name, way in ways.items():
            began = time.perf_counter()
            way()
            taken[name].append(time.perf_counter() - began)
    rows = []
    for name in ways:
        ratios = sorted(own / plain for own, plain in zip(taken[name], taken["plain"]))
        milliseconds = f"{1000 * statistics.median(taken[name]):.0f} ms"
        spread = f"{statistics.median(ratios):.2f} ({ratios[0]:.2f} to {ratios[-1]:.2f})"
        rows.append([name, f"{bytes_of[name] / 2**20:.1f}", f"{bytes_of[name] / bytes_of['plain']:.2f}", milliseconds, spread])
    table = results.table(["step", "peak MiB", "x plain", "time", "x plain, median (range)"], rows)
    shape = f"{TIMED.num_layers} x {TIMED.dim}, context {TIMED.context}, {TIMED_ROWS} rows, forward and backward"
    return f"{memory()}\n\n{shape}:\n\n{table}"
