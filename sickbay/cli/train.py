"""Train the reference transformer on a text file, character by character.

The defaults are nanoGPT's recipe for a CPU: 4 layers, 4 heads, 128 wide, context 64, 2000 steps of 12 rows.
The run's folder holds the checkpoint for `sickbay generate`; --resume goes on from it, bit for bit.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import json
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sickbay.core.errors import UsageError

if TYPE_CHECKING:
    from sickbay.reference.checkpoint import State
    from sickbay.reference.data import Corpus

NAME = "train"

# Option, its kind, its meaning. None stands for "not given", so that a resumed run can tell what the user asked for.
_SHAPE: tuple[tuple[str, Any, str], ...] = (
    ("layers", int, "blocks (4)"),
    ("heads", int, "attention heads (4)"),
    ("dim", int, "width (128)"),
    ("ffn-dim", int, "width inside the feed-forward part (4 x dim)"),
    ("context", int, "positions of one row (64)"),
    ("dropout", float, "share of activations dropped (0)"),
    ("norm", ("rmsnorm", "layernorm"), "normalisation (rmsnorm)"),
    ("norm-place", ("pre", "post"), "before each part or after its sum (pre)"),
    ("positions", ("rotary", "learned"), "how positions are told (rotary)"),
    ("activation", ("gelu", "swiglu", "relu"), "of the feed-forward part (gelu)"),
)
_RECIPE: tuple[tuple[str, Any, str], ...] = (
    ("steps", int, "optimizer steps (2000)"),
    ("batch", int, "rows of one micro-batch (12)"),
    ("accumulation", int, "micro-batches of one step (1)"),
    ("lr", float, "highest learning rate (1e-3)"),
    ("min-lr", float, "learning rate at the end (a tenth of --lr)"),
    ("warmup", int, "steps of linear rise (100)"),
    ("beta2", float, "AdamW's second decay rate (0.99)"),
    ("weight-decay", float, "decoupled, on matrices (0.1)"),
    ("clip", float, "largest global gradient norm, 0 = never (1.0)"),
    ("seed", int, "of weights, batches and dropout (1337)"),
    ("eval-every", int, "steps between evaluations, 0 = only at the end (250)"),
    ("save-every", int, "steps between checkpoints, 0 = only at the end (500)"),
)
_FIELD = {"layers": "num_layers", "heads": "num_heads", "batch": "batch_size", "lr": "learning_rate", "min_lr": "min_learning_rate"}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The command's options stand in `parser`."""
    parser.add_argument("text", metavar="TEXT", type=Path, help="a UTF-8 text file; its last tenth is kept for validation")
    parser.add_argument("--out", metavar="DIR", type=Path, help="the run's folder (sickbay-runs/<time>-train)")
    parser.add_argument("--resume", action="store_true", help="go on from the newest checkpoint in --out")
    for title, options in (("model", _SHAPE), ("recipe", _RECIPE)):
        group = parser.add_argument_group(title)
        for name, kind, meaning in options:
            if isinstance(kind, tuple):
                group.add_argument(f"--{name}", choices=kind, help=meaning)
            else:
                group.add_argument(f"--{name}", type=kind, metavar="N" if kind is int else "X", help=meaning)
    parser.add_argument("--untied", action="store_true", help="give the head its own matrix instead of the embedding's")
    parser.add_argument("--device", help="torch device (cuda where there is one, else cpu)")
    parser.add_argument("--watch", action="store_true", help="let sickbay watch the loop")
    parser.add_argument("--json", action="store_true", help="the result as JSON on stdout")


def main(args: argparse.Namespace) -> int:
    """0 when the model is trained and saved, 1 when its loss is no longer finite. Raises UsageError."""
    shape, chosen = _given(args, _SHAPE), _given(args, _RECIPE)
    if args.untied:
        shape["tied_embeddings"] = False
    if "clip" in chosen:
        chosen["clip"] = chosen["clip"] or None
    if args.resume and args.out is None:
        raise UsageError("--resume needs --out DIR, the folder of the run to go on from")
    out = args.out or Path("sickbay-runs") / f"{time.strftime('%Y%m%d-%H%M%S')}-train"

    from sickbay.reference import train
    from sickbay.reference.config import Config
    from sickbay.reference.recipe import Recipe

    earlier = _earlier(out, args.resume)
    try:
        # The whole command is checked before anything is written.
        recipe = _continued(earlier, shape, chosen) if earlier else Recipe(**chosen)
        config = earlier.config if earlier else Config(**shape)
        device = _device(args.device)
        corpus = _corpus(args.text, out, config.context, earlier)
        config = dataclasses.replace(config, vocab_size=corpus.tokenizer.vocab_size)
        result = train.train(corpus, config, recipe, out, resume=earlier, device=device, watch=args.watch)
    except ValueError as problem:
        raise UsageError(str(problem)) from problem
    except OSError as problem:
        raise UsageError(
            f"{out} cannot be written: {problem.strerror}; --resume goes on from its newest checkpoint once it can"
        ) from problem
    except FloatingPointError as problem:
        print(f"sickbay train: {problem}; `sickbay run -m sickbay train ...` finds the cause, a lower --lr often helps", file=sys.stderr)
        return 1
    if args.json:
        print(json.dumps(dataclasses.asdict(result)))
    else:
        print(f"validation loss {result.val_loss:.4f} ({result.bits_per_byte:.3f} bits per byte), {result.parameters:,} parameters")
        print(f"checkpoint {result.checkpoint}")
        print(f"sample it: sickbay generate {result.checkpoint}")
    return 0


def _given(args: argparse.Namespace, options: tuple[tuple[str, Any, str], ...]) -> dict[str, Any]:
    """The options the user gave, by the field's name."""
    names = [name.replace("-", "_") for name, _, _ in options]
    return {_FIELD.get(name, name): getattr(args, name) for name in names if getattr(args, name) is not None}


def _earlier(out: Path, resume: bool) -> State | None:
    """The checkpoint to go on from, None for a new run. Raises UsageError where the two cannot be told apart safely."""
    from sickbay.reference import checkpoint

    try:
        checkpoint.find(out)
    except FileNotFoundError:
        if resume:
            raise UsageError(f"nothing to resume: {out} holds no checkpoint; drop --resume to start a new run there") from None
        return None
    if not resume:
        raise UsageError(f"{out} already holds a run; --resume goes on with it, another --out starts a new one")
    try:
        return checkpoint.read(out)
    except (OSError, ValueError) as problem:
        raise UsageError(f"cannot resume: {problem}") from problem


def _continued(earlier: State, shape: dict[str, Any], chosen: dict[str, Any]) -> Any:
    """The recipe of `earlier`, only --steps (and what does not touch the numbers) changed. Raises UsageError otherwise."""
    from sickbay.reference.recipe import Recipe

    recorded = {**dataclasses.asdict(earlier.config), **earlier.recipe}
    free = ("steps", "eval_every", "save_every")
    changed = [field for field, value in {**shape, **chosen}.items() if field not in free and recorded[field] != value]
    if changed:
        was = ", ".join(f"{field} was {recorded[field]}" for field in changed)
        raise UsageError(f"a resumed run keeps its model and recipe ({was}); leave the option out, or start anew with another --out")
    recipe = Recipe(**{**earlier.recipe, **{field: chosen[field] for field in free if field in chosen}})
    if recipe.steps <= earlier.step:
        raise UsageError(f"{earlier.folder} has all of its {recipe.steps} steps; a larger --steps goes on")
    return recipe


def _corpus(text: Path, out: Path, context: int, earlier: State | None) -> Corpus:
    """The text's tokens, kept beside the run's folder. Raises UsageError where the text or the folder cannot be used."""
    from sickbay.reference import data

    tokenizer, source = (None, None) if earlier is None else (earlier.tokenizer, earlier.source)
    try:
        out.mkdir(parents=True, exist_ok=True)
        return data.prepare(text, out.parent / "tokens", None, tokenizer, expected=source, context=context)
    except OSError as problem:
        raise UsageError(f"{problem.filename or text}: {problem.strerror}; choose a readable TEXT and a writable --out") from problem
    finally:
        with contextlib.suppress(OSError):
            out.rmdir()  # only where it is empty


def _device(asked: str | None) -> str:
    import torch

    if asked is None:
        return "cuda" if torch.cuda.is_available() else "cpu"
    try:
        torch.zeros(1, device=asked)
    except (RuntimeError, AssertionError) as problem:
        reason = str(problem).splitlines()[0]
        raise UsageError(f"device {asked!r} cannot be used: {reason}; leave --device out to let sickbay choose") from problem
    return asked
