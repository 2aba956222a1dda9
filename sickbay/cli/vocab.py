"""Count what a vocabulary does with a text, and prune what it never uses.

    sickbay vocab stats sickbay-runs/talk book.txt
    sickbay vocab stats tokenizer.json book.txt more/ --dim 768
    sickbay vocab prune path/to/gpt2 book.txt --keep 8000 --out gpt2-small-vocab

Pruning keeps special tokens, the byte fallback, the most frequent tokens of the text and what BPE merges on the way to them. Tokenizer,
merges, rows of embedding and head change together: texts still decode to themselves, kept ids keep their logits.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
from pathlib import Path
from typing import TYPE_CHECKING

from sickbay.core.errors import UsageError
from sickbay.core.plan import gibibytes

if TYPE_CHECKING:
    from sickbay.reference.data.sources import Text
    from sickbay.reference.text.vocab import Cost, Use

NAME = "vocab"
FLOAT_BYTES = 4


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The two subcommands and their options stand in `parser`."""
    commands = parser.add_subparsers(dest="command", required=True, metavar="stats|prune")
    stats = commands.add_parser("stats", help="counts, coverage, bytes per token, unused ids, and what the rows cost")
    stats.add_argument("tokenizer", metavar="TOKENIZER", type=Path, help="a tokenizer.json, a checkpoint or its run, or a model's folder")
    prune = commands.add_parser("prune", help="a checkpoint with fewer ids, in a new folder")
    prune.add_argument(
        "checkpoint", metavar="CHECKPOINT", type=Path, help="of `sickbay train`, or a transformers folder (safetensors, BPE)"
    )
    for command in (stats, prune):
        command.add_argument("text", metavar="TEXT", type=Path, nargs="+", help="UTF-8 texts, JSONL files, or folders of them")
        command.add_argument("--field", default="text", metavar="NAME", help="of a JSONL row, the one that holds the text (text)")
        command.add_argument("--json", action="store_true", help="the result as JSON on stdout")
    stats.add_argument("--dim", type=int, metavar="N", help="width of a model to be, for what its rows will cost")
    prune.add_argument("--keep", type=int, metavar="N", help="ids to keep, special tokens and bytes among them (all that the text uses)")
    prune.add_argument("--out", type=Path, metavar="DIR", required=True, help="the new checkpoint's folder")


def main(args: argparse.Namespace) -> int:
    """0 when the statistics are told or the new checkpoint is written. Raises UsageError."""
    from sickbay.reference.data.sources import Text

    text = Text.at(args.text, args.field)
    try:
        return _stats(args, text) if args.command == "stats" else _prune(args, text)
    except ValueError as problem:
        raise UsageError(str(problem)) from problem
    except BrokenPipeError:
        raise  # the reader of our output has gone: no fault of the texts
    except OSError as problem:
        raise UsageError(f"{problem.filename or problem}: {problem.strerror or 'not found'}; nothing was written") from problem


def _stats(args: argparse.Namespace, text: Text) -> int:
    from sickbay.reference.text import vocab
    from sickbay.reference.text.tokenizer import load

    if args.dim is not None and args.dim < 1:
        raise UsageError(f"--dim is {args.dim}; it must be at least 1")
    place = _tokenizer_place(args.tokenizer)
    tokenizer = load(place)
    used = vocab.use(vocab.count_ids(text, tokenizer), tokenizer)
    cost = vocab.cost(place) if place.is_dir() else None
    to_be = None if args.dim is None else vocab.STATE_COPIES * FLOAT_BYTES * used.vocab_size * args.dim
    if args.json:
        print(
            json.dumps(
                {
                    "tokenizer": str(place),
                    **dataclasses.asdict(used),
                    "model": cost and dataclasses.asdict(cost),
                    "training_bytes_at_dim": to_be,
                }
            )
        )
    else:
        print("\n".join(_told(place, used, cost, args.dim, to_be)))
    return 0


def _prune(args: argparse.Namespace, text: Text) -> int:
    from sickbay.reference.text.prune_checkpoint import prune_checkpoint

    _tokenizer_place(args.checkpoint)
    made = prune_checkpoint(args.checkpoint, text, args.out, args.keep)
    if args.json:
        print(json.dumps(dataclasses.asdict(made)))
        return 0
    grown = made.tokens / made.old_tokens - 1
    print(f"ids        {made.old_vocab_size:>13,} -> {made.vocab_size:,}")
    print(f"parameters {made.old_parameters:>13,} -> {made.parameters:,}")
    print(f"tokens     {made.old_tokens:>13,} -> {made.tokens:,} for this text ({grown:+.1%})")
    print(f"checkpoint {made.folder}")
    return 0


def _tokenizer_place(path: Path) -> Path:
    """The tokenizer's file, or the folder that holds it: of a run, its newest checkpoint. Raises UsageError."""
    if path.is_file() or (path / "tokenizer.json").is_file():
        return path
    if not path.exists():
        raise UsageError(f"nothing at {path}; give a tokenizer.json, a checkpoint of `sickbay train` or a transformers folder")
    from sickbay.reference.saving import checkpoint

    try:
        return checkpoint.find(path)
    except FileNotFoundError:
        raise UsageError(f"{path} holds neither a tokenizer.json nor a checkpoint of `sickbay train`") from None


def _told(place: Path, used: Use, cost: Cost | None, dim: int | None, to_be: int | None) -> list[str]:
    end = "none" if used.end_of_text is None else str(used.end_of_text)
    lines = [
        f"{place}: {used.vocab_size:,} ids, {used.special} of them special (end of text: {end})",
        f"text           {used.text_bytes:>13,} bytes in {used.tokens:,} tokens: {used.bytes_per_token:.2f} bytes per token",
        f"used           {used.used:>13,} ids ({used.used / used.vocab_size:.1%}), {used.once:,} of them once; {len(used.unused):,} never",
    ]
    lines += [
        f"{'coverage' if number == 0 else '':<14} {share:>13.1%} of the tokens: {count:,} ids"
        for number, (share, count) in enumerate(used.coverage.items())
    ]
    lines += [
        f"{'most frequent' if line == 0 else '':<14} {share:>13.2%} {text!r} ({number})"
        for line, (number, text, share) in enumerate(used.most_frequent)
    ]
    if cost is not None:
        unused = sum(number < cost.rows for number in used.unused) + max(0, cost.rows - used.vocab_size)
        lines += [
            f"rows           {gibibytes(cost.weight_bytes):>13} for {cost.rows:,} x {cost.dim:,}"
            + (", embedding and head" if cost.matrices > 1 else ", the head shares them")
            + f": {cost.share:.0%} of {cost.parameters:,} parameters",
            f"               {gibibytes(cost.training_bytes):>13} in training, with gradient and AdamW's two moments",
            f"               {gibibytes(cost.training_bytes * unused / cost.rows):>13} of that for ids this text never uses",
        ]
    if to_be is not None:
        lines += [f"rows           {gibibytes(to_be):>13} in training at width {dim:,}, with gradient and AdamW's two moments"]
    return lines
