"""Write text with a checkpoint of the reference transformer.

Greedy with --temperature 0; otherwise drawn, after the repetition penalty, the temperature, top-k and top-p, in this order.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from pathlib import Path

from sickbay.core.errors import UsageError

NAME = "generate"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The command's options stand in `parser`."""
    parser.add_argument("checkpoint", metavar="CHECKPOINT", type=Path, help="a checkpoint of `sickbay train`, or its run's folder")
    parser.add_argument("--prompt", default="\n", help="the text to go on from (a line end)")
    parser.add_argument("--tokens", type=int, default=500, metavar="N", help="how many to write (500)")
    parser.add_argument("--temperature", type=float, default=0.8, metavar="X", help="0 = always the likeliest; 1 = the model's own (0.8)")
    parser.add_argument("--top-k", type=int, metavar="N", help="draw among the N likeliest only")
    parser.add_argument("--top-p", type=float, metavar="X", help="draw among the fewest that hold this probability")
    parser.add_argument(
        "--repetition-penalty", type=float, default=1.0, metavar="X", help="log-probabilities of tokens already there times this (1)"
    )
    parser.add_argument("--seed", type=int, default=0, metavar="N", help="same seed, same text (0)")
    parser.add_argument("--json", action="store_true", help="prompt, text and settings as JSON on stdout")


def main(args: argparse.Namespace) -> int:
    """0 when the text is written. Raises UsageError."""
    if args.tokens < 1:
        raise UsageError(f"--tokens is {args.tokens}; it must be at least 1")
    if not args.checkpoint.exists():
        raise UsageError(f"no checkpoint at {args.checkpoint}; `sickbay train TEXT` makes one and prints its path")

    import dataclasses

    import torch

    from sickbay.reference import checkpoint
    from sickbay.reference.generate import Decoding, generate

    try:
        decoding = Decoding(args.temperature, args.top_k, args.top_p, args.repetition_penalty)
        state = checkpoint.read(args.checkpoint)
        model = checkpoint.load_weights(state)
        prompt = args.prompt or state.tokenizer.characters[0]
        ids = torch.from_numpy(state.tokenizer.encode(prompt))[None]
    except (OSError, ValueError) as problem:
        raise UsageError(f"{problem}") from problem
    random = torch.Generator().manual_seed(args.seed)
    started = time.perf_counter()
    pieces = [] if args.json else [prompt]
    if not args.json:
        sys.stdout.write(prompt)
    try:
        for chosen in generate(model, ids, args.tokens, decoding, random):
            pieces.append(state.tokenizer.decode(chosen))
            if not args.json:
                sys.stdout.write(pieces[-1])
                sys.stdout.flush()
    except ValueError as problem:
        raise UsageError(f"{args.checkpoint}: {problem}") from problem
    if args.json:
        seconds = time.perf_counter() - started
        settings = {**dataclasses.asdict(decoding), "seed": args.seed}
        print(json.dumps({"prompt": prompt, "text": "".join(pieces), "tokens": args.tokens, "seconds": seconds, "decoding": settings}))
    else:
        print()
    return 0
