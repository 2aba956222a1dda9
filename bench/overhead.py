"""What watching costs: the same training loop with plain Python and with `sickbay run`, default settings, taking turns of a few steps.

    python bench/overhead.py                    all shapes, 5 pairs each
    python bench/overhead.py --shapes tiny --pairs 1 --steps 40
    python bench/overhead.py --write            also puts the table into RESULTS.md

The two of a pair are processes of their own, so nothing of the watch is in the bare one. They take turns of half a second or so,
and ratios are taken within pairs, so that a machine that grows slower or faster does so for both.
"""

from __future__ import annotations

import argparse
import resource
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from turns import Player, Requests

_TURN = 0.5  # seconds of a turn, about


@dataclass(frozen=True)
class Shape:
    """A model and a length of run. `settled`: the step from which on a run counts as steady."""

    num_layers: int
    dim: int
    num_heads: int
    context: int
    batch_size: int
    steps: int
    settled: int


SHAPES = {
    "least": Shape(num_layers=2, dim=64, num_heads=4, context=64, batch_size=8, steps=2000, settled=400),
    "tiny": Shape(num_layers=4, dim=128, num_heads=4, context=64, batch_size=12, steps=400, settled=120),
    "small": Shape(num_layers=6, dim=384, num_heads=6, context=128, batch_size=2, steps=120, settled=45),
}


@dataclass
class Run:
    """Seconds of each step, and the most memory the process held, in MiB."""

    seconds: list[float]
    peak: float

    def typical(self, settled: int) -> float:
        """Median seconds of a steady step."""
        return statistics.median(self.seconds[settled:])

    def mean(self, settled: int) -> float:
        """Mean seconds of a steady step: what falls on few steps is in it."""
        return statistics.fmean(self.seconds[settled:])


def training_step(shape: Shape) -> Callable[[], None]:
    """One step of a plain training loop on the shipped text."""
    import torch
    from torch.nn import functional

    from sickbay.reference import data
    from sickbay.reference.case import shipped_corpus
    from sickbay.reference.models.config import Config
    from sickbay.reference.models.model import Transformer

    torch.set_num_threads(1)
    torch.manual_seed(0)
    model = Transformer(Config(dim=shape.dim, num_layers=shape.num_layers, num_heads=shape.num_heads, context=shape.context))
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, betas=(0.9, 0.99), weight_decay=0.1)
    batches = iter(data.random_batches(shipped_corpus().numpy(), shape.context, shape.batch_size, seed=0))

    def step() -> None:
        ids, targets = next(batches)
        loss = functional.cross_entropy(model(ids).flatten(0, 1), targets.flatten())
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        loss.item()

    return step


def train(shape: Shape) -> None:
    """Answers every request for steps with the seconds of each, and the most memory held so far in MiB."""
    requests = Requests()
    step = training_step(shape)
    for request in requests:
        seconds = []
        for _ in range(request["steps"]):
            began = time.perf_counter()
            step()
            seconds.append(time.perf_counter() - began)
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / (2**20 if sys.platform == "darwin" else 2**10)
        requests.answer({"seconds": seconds, "peak": peak})


def pair(name: str, steps: int) -> tuple[Run, Run]:
    """The same training bare and watched, by turns; who comes first alternates. Raises RuntimeError where one of them dies."""
    script, arguments, alone = Path(__file__).resolve(), ("--child", name), {"OMP_NUM_THREADS": "1"}
    with tempfile.TemporaryDirectory() as folder:
        under = ("-m", "sickbay", "run", "--out", str(Path(folder) / "run"))
        with (
            Player("the bare run", script, *arguments, environment=alone) as bare,
            Player("the watched run", script, *arguments, under=under, environment=alone) as watched,
        ):
            runs, turn = (Run([], 0.0), Run([], 0.0)), 1
            while len(runs[0].seconds) < steps:
                order = ((bare, runs[0]), (watched, runs[1]))
                turn = min(turn, steps - len(runs[0].seconds))
                for player, run in order if len(runs[0].seconds) // turn % 2 else order[::-1]:
                    answer = player.ask(steps=turn)
                    run.seconds.extend(answer["seconds"])
                    run.peak = answer["peak"]
                turn = max(1, round(_TURN / statistics.median(runs[0].seconds)))
            return runs


def pairs(name: str, steps: int, count: int) -> list[tuple[Run, Run]]:
    """`count` pairs (bare, watched)."""
    found = []
    for number in range(count):
        found.append(pair(name, steps))
        bare, watched = found[-1]
        print(
            f"{name} pair {number + 1}: {sum(bare.seconds):.1f} s bare, {sum(watched.seconds):.1f} s watched", file=sys.stderr, flush=True
        )
    return found


def row(name: str, shape: Shape, measured: list[tuple[Run, Run]]) -> list[str]:
    settled = min(shape.settled, len(measured[0][0].seconds) // 2)

    def share(ratios: list[float]) -> str:
        percent = sorted(100 * (ratio - 1) for ratio in ratios)
        return f"{statistics.median(percent):+.1f} % ({percent[0]:+.1f} to {percent[-1]:+.1f})"

    bare_step = statistics.median(bare.typical(settled) for bare, _ in measured)
    start = statistics.median(sum(watched.seconds[:settled]) - sum(bare.seconds[:settled]) for bare, watched in measured)
    memory = sorted(watched.peak - bare.peak for bare, watched in measured)
    return [
        f"{name}: {shape.num_layers} layers, {shape.dim} wide, {shape.batch_size} x {shape.context} tokens",
        f"{1000 * bare_step:.1f} ms",
        share([watched.typical(settled) / bare.typical(settled) for bare, watched in measured]),
        share([watched.mean(settled) / bare.mean(settled) for bare, watched in measured]),
        f"{start:+.2f} s in {settled} steps",
        share([sum(watched.seconds) / sum(bare.seconds) for bare, watched in measured]),
        f"{statistics.median(memory):+.0f} MiB (at most {memory[-1]:+.0f})",
    ]


HEADING = [
    "model",
    "bare step, median",
    "steady step, median",
    "steady step, mean",
    "first steps, with their exams",
    "whole run",
    "peak memory",
]


def main() -> None:
    args = arguments()
    if args.child:
        train(SHAPES[args.child])
        return
    import results

    rows = []
    for name in args.shapes:
        steps = args.steps or SHAPES[name].steps
        rows.append(row(name, SHAPES[name], pairs(name, steps, args.pairs)))
    text = (
        f"Watched against bare, {args.pairs} pairs of processes each, one thread, taking turns of {_TURN} s; the median of the pairs' "
        f"ratios, in brackets the least and the greatest.\n\n{results.table(HEADING, rows)}\n\n{results.conditions()}"
    )
    print(text)
    if args.write:
        results.put("overhead", f"## Overhead\n\n{text}")


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shapes", nargs="+", choices=SHAPES, default=list(SHAPES))
    parser.add_argument("--pairs", type=int, default=5)
    parser.add_argument("--steps", type=int, default=0, help="of each run (0 = the shape's own)")
    parser.add_argument("--write", action="store_true", help="put the table into RESULTS.md")
    parser.add_argument("--child", choices=SHAPES, help=argparse.SUPPRESS)
    return parser.parse_args()


if __name__ == "__main__":
    main()
