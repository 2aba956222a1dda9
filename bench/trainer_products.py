"""One matrix product by the textbook's loops, by blocked loops, and by torch; and what share of the latter a training step reaches."""

from __future__ import annotations

import ctypes
import os
import shutil
import statistics
import subprocess
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import results
import torch
from torch import Tensor
from trainer_loops import SETTINGS, SHAPES, Text, our_step

from sickbay.reference.evaluation.flops import measured_peak, training_flops_per_token

SOURCE = Path(__file__).with_name("products.c")
SIDE = 512
TILE = 128  # of the blocked loop
TRAINING_STEPS = 8


def compiled(folder: Path) -> Any:
    """products.c as a library, None without a C compiler. -O2 alone does not reorder a float sum: a plain loop stays plain."""
    compiler = os.environ.get("CC") or shutil.which("cc") or shutil.which("gcc") or shutil.which("clang")
    if compiler is None:
        return None
    target = folder / "products.so"
    for parallel in (["-fopenmp"], []):
        if subprocess.run([compiler, "-O2", *parallel, "-shared", "-fPIC", "-o", target, SOURCE], capture_output=True).returncode == 0:
            return ctypes.CDLL(str(target))
    return None


def seconds(work: Callable[[], object]) -> float:
    began = time.perf_counter()
    work()
    return time.perf_counter() - began


def measure(rounds: int) -> str:
    """A table of FLOP/s by kind of product, each tried once in each of `rounds` rounds, and the training step's share of the peak."""
    cores = torch.get_num_threads()
    left, right = torch.randn(SIDE, SIDE), torch.randn(SIDE, SIDE)
    out = torch.empty(SIDE, SIDE)
    expected = left @ right

    def address(tensor: Tensor) -> ctypes.c_void_p:
        return ctypes.c_void_p(tensor.data_ptr())

    three = (address(left), address(right), address(out))
    side, tile = ctypes.c_size_t(SIDE), ctypes.c_size_t(TILE)
    with tempfile.TemporaryDirectory() as folder:
        library = compiled(Path(folder))
        ways: dict[str, Callable[[], object]] = {}
        if library is not None:
            ways["three loops, C, 1 thread"] = lambda: library.naive(side, *three)
            ways[f"blocked loops ({TILE}), C, 1 thread"] = lambda: library.blocked(side, *three, tile, 1)
            ways[f"blocked loops ({TILE}), C, {cores} threads"] = lambda: library.blocked(side, *three, tile, cores)
        ways[f"torch.mm, {cores} threads"] = lambda: torch.mm(left, right, out=out)
        for name, work in ways.items():
            out.zero_()
            work()
            assert torch.allclose(out, expected, atol=1e-3), name
        taken: dict[str, list[float]] = {name: [] for name in ways}
        for _ in range(rounds):
            for name, work in ways.items():
                taken[name].append(seconds(work))
    base = next(iter(ways))
    rows = []
    for name in ways:
        ratios = sorted(first / own for first, own in zip(taken[base], taken[name]))
        best = 2 * SIDE**3 / min(taken[name])
        rows.append([name, f"{best / 1e9:.1f}", f"{statistics.median(ratios):.1f} ({ratios[0]:.1f} to {ratios[-1]:.1f})"])
    note = "" if len(ways) > 1 else "There is no C compiler here: the loops were left out. "
    heading = [f"{SIDE} x {SIDE} float32 product", "GFLOP/s, best", f"x {base}, median (range)"]
    return f"{note}{results.table(heading, rows)}\n\n{shares(rounds)}"


def shares(rounds: int) -> str:
    """The training step's arithmetic against the peak, both measured in turn."""
    said = []
    text = Text()
    for name, shape in SHAPES.items():
        model, step = our_step(SETTINGS["ours"], shape, text)
        step(0.0)
        peaks, rates = [], []
        work = training_flops_per_token(model, model.config) * shape.batch_size * shape.context
        steps = TRAINING_STEPS if name == "tiny" else TRAINING_STEPS // 4
        for _ in range(rounds):
            peaks.append(measured_peak())
            rates.append(work / statistics.median(seconds(partial(step, 0.0)) for _ in range(steps)))
        share = sorted(rate / peak for rate, peak in zip(rates, peaks))
        reached, most = statistics.median(rates) / 1e9, statistics.median(peaks) / 1e9
        said.append(
            f"At {shape.num_layers} x {shape.dim} a training step does {work / 1e9:.2f} GFLOP at {reached:.0f} GFLOP/s, "
            f"{statistics.median(share):.0%} ({share[0]:.0%} to {share[-1]:.0%}) of the best 1024 x 1024 product's {most:.0f} (MFU)."
        )
    return " ".join(said)
