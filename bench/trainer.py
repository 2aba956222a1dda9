"""How fast the reference trains, and how well: everything side by side, in processes that take turns.

    python bench/trainer.py --nanogpt PATH            every part (a quarter of an hour on two quiet cores)
    python bench/trainer.py --nanogpt PATH --only throughput --rounds 2 --steps 2
    python bench/trainer.py --only products costs     what needs no nanoGPT
    python bench/trainer.py --nanogpt PATH --write    also puts the parts into RESULTS.md

PATH: a folder with nanoGPT's model.py, e.g. of `git clone https://github.com/karpathy/nanoGPT`.
Parts: throughput (tokens/s of each loop), equal (loss curves from the same weights), race (validation loss in the seconds that
nanoGPT's recipe takes), products (FLOP/s of a step and of matrix products), costs (memory and time of the remedies).
"""

from __future__ import annotations

import argparse
import contextlib
import statistics
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import results
import trainer_costs
import trainer_products
from trainer_loops import README, SETTINGS, SHAPES
from turns import Player

HERE = Path(__file__).resolve().parent
PARTS = ("throughput", "equal", "race", "products", "costs")
NEEDS_NANOGPT = ("throughput", "equal", "race")
TOLD = {
    "nanogpt": "nanoGPT's model and loop",
    "transformers": "transformers' Trainer, GPT-2",
    **{name: setting.told for name, setting in SETTINGS.items()},
}
RACERS = ("schedule", "modern", "best")
RACE_SLICES = 20  # of the race: each takes its turn in each
EQUAL_STEPS = {"tiny": 50, "small": 30}


def player(name: str, shape: str, nanogpt: Path | None, *more: str) -> Player:
    folder = [] if nanogpt is None else ["--nanogpt", str(nanogpt)]
    return Player(name, HERE / "trainer_loops.py", name, "--shape", shape, *folder, *more)


def throughput(nanogpt: Path, rounds: int, steps: int) -> str:
    """Tokens/s of every loop at both shapes: `rounds` turns of `steps` steps each, after one turn that does not count."""
    names, parts = ("nanogpt", "transformers", "ours", "ours-compiled", "ours-bf16"), []
    for name, shape in SHAPES.items():
        each = max(1, steps // 4) if name == "small" else steps
        with contextlib.ExitStack() as stack:
            players = {loop: stack.enter_context(player(loop, name, nanogpt)) for loop in names}
            first = {loop: players[loop].ask(steps=1)[0] for loop in names}
            medians: dict[str, list[float]] = {loop: [] for loop in names}
            for number in range(rounds):
                for loop in (*names[number % len(names) :], *names[: number % len(names)]):
                    medians[loop].append(statistics.median(players[loop].ask(steps=each)))
                say(f"{name} {number + 1}/{rounds}: " + ", ".join(f"{loop} {1000 * medians[loop][-1]:.0f} ms" for loop in names))
            facts = players["ours"].ask(facts=True)
        tokens = shape.batch_size * shape.context
        rows = []
        for loop in names:
            step = statistics.median(medians[loop])
            ratios = sorted(base / own for base, own in zip(medians["nanogpt"], medians[loop]))
            rows.append(
                [
                    TOLD[loop],
                    f"{1000 * step:.1f} ms",
                    f"{tokens / step:,.0f}",
                    f"{statistics.median(ratios):.2f} ({ratios[0]:.2f} to {ratios[-1]:.2f})",
                    f"{facts['flops'] * tokens / step / 1e9:.0f}",
                    f"{first[loop]:.1f} s",
                ]
            )
        table = results.table(["loop", "median step", "tokens/s", "x nanoGPT, median (range) of the rounds", "GFLOP/s", "first step"], rows)
        told = f"{shape.num_layers} x {shape.dim}, context {shape.context}, batch {shape.batch_size}, {facts['parameters']:,} parameters"
        parts.append(f"{told}; {rounds} rounds of {each} steps each:\n\n{table}")
    return "\n\n".join(parts)


def equal(nanogpt: Path) -> str:
    """How far the losses of nanoGPT's loop and ours are apart over the same batches from the same weights, in float32 and in bf16."""
    told = []
    for shape, steps in EQUAL_STEPS.items():
        with tempfile.TemporaryDirectory() as folder:
            start = str(Path(folder) / "first.pt")
            with player("nanogpt", shape, nanogpt, "--start", start) as theirs:
                losses = theirs.ask(losses=steps)
                worst = {}
                for name in ("ours", "ours-bf16"):
                    with player(name, shape, nanogpt, "--start", start) as ours:
                        worst[name] = max(abs(one - other) for one, other in zip(losses, ours.ask(losses=steps)))
        each = SHAPES[shape]
        told.append(
            f"{each.num_layers} x {each.dim}: from nanoGPT's first weights, over the same batches and schedule, the losses of "
            f"{steps} steps differ by at most {worst['ours']:.1e} nats, with products in bf16 by at most {worst['ours-bf16']:.1e} "
            f"(they fall from {losses[0]:.4f} to {losses[-1]:.4f})."
        )
    return "\n\n".join(told)


def race(nanogpt: Path, iterations: int, names: Sequence[str]) -> str:
    """Validation losses after the seconds that nanoGPT takes for `iterations` steps with its evaluations.

    In each of 20 slices nanoGPT does its share, then every other trains for exactly as long; schedules follow the clock.
    """
    with contextlib.ExitStack() as stack:
        base = stack.enter_context(player("nanogpt", "tiny", nanogpt))
        players = {name: stack.enter_context(player(name, "tiny", nanogpt)) for name in names}
        for each in (base, *players.values()):
            each.ask(facts=True)  # imports are over
        slices, total, counts = min(RACE_SLICES, iterations), 0.0, dict.fromkeys(names, 0)
        for number in range(slices):
            share = iterations * (number + 1) // slices - iterations * number // slices
            seconds = sum(base.ask(steps=share))
            total += seconds
            for name in names:
                counts[name] += players[name].ask(until=seconds, **{"from": number / slices, "to": (number + 1) / slices})
            say(f"race {number + 1}/{slices}: {total:.0f} s, {counts}")
        losses = {"nanogpt": base.ask(evaluate=True), **{name: players[name].ask(evaluate=True) for name in names}}
        facts = {name: players[name].ask(facts=True)["parameters"] for name in names} | {"nanogpt": base.ask(facts=True)["parameters"]}
    shape, rows = SHAPES["tiny"], []
    for name, steps in {"nanogpt": iterations, **counts}.items():
        changed = SETTINGS[name].recipe if name in SETTINGS else {}
        tokens = changed.get("batch_size", shape.batch_size) * shape.context
        gained = f"{losses[name] - losses['nanogpt']:+.4f}"
        rows.append([TOLD[name], f"{losses[name]:.4f}", gained, f"{steps:,}", f"{steps * tokens / total:,.0f}", f"{facts[name]:,}"])
    heading = ["recipe", "validation loss", "against nanoGPT", "steps", "tokens/s", "parameters"]
    return (
        f"The same {total:.0f} seconds of training for each, those of nanoGPT's {iterations:,} iterations without its evaluations; "
        f"the loss over the whole validation split in windows of 64, one seed:\n\n{results.table(heading, rows)}"
    )


def say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


def main() -> None:
    args = arguments()
    chosen = {
        "throughput": lambda: throughput(args.nanogpt, args.rounds, args.steps),
        "equal": lambda: equal(args.nanogpt),
        "race": lambda: race(args.nanogpt, args.iterations, args.racers),
        "products": lambda: trainer_products.measure(args.rounds),
        "costs": lambda: trainer_costs.measure(args.rounds),
    }
    for part in args.only:
        text = f"{chosen[part]()}\n\n{results.conditions()}"
        print(f"{part}\n\n{text}\n", flush=True)
        if args.write:
            results.put(f"trainer-{part}", f"## Trainer: {part}\n\n{text}")


def arguments() -> Any:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--nanogpt", type=Path, metavar="PATH", help="a folder with nanoGPT's model.py")
    parser.add_argument("--only", nargs="+", choices=PARTS, default=list(PARTS))
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--steps", type=int, default=16, help="of a turn at the tiny shape; a quarter of it at the small one")
    parser.add_argument("--iterations", type=int, default=README.steps, help="of nanoGPT in the race")
    parser.add_argument("--racers", nargs="+", choices=SETTINGS, default=list(RACERS))
    parser.add_argument("--write", action="store_true", help="put the parts into RESULTS.md")
    args = parser.parse_args()
    if set(args.only) & set(NEEDS_NANOGPT) and not (args.nanogpt and (args.nanogpt / "model.py").is_file()):
        parser.error(
            f"{', '.join(NEEDS_NANOGPT)} need --nanogpt PATH, a folder with nanoGPT's model.py: "
            "`git clone https://github.com/karpathy/nanoGPT` makes one; --only products costs needs none"
        )
    return args


if __name__ == "__main__":
    main()
