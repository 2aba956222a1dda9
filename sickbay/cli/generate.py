"""Write text with a trained transformer: a run of `sickbay train`, or a folder with a GPT-2 or Llama of transformers.

Of an encoder-decoder the prompt is the source: a text with holes, 'To be<0>not to be', or what is to be translated.

Each token is drawn after the penalties, the temperature, top-k, top-p, min-p and typical, in this order; --temperature 0 takes the
likeliest, --beams searches for the likeliest text. --interactive goes on from what you type, line by line: ctrl-C ends an answer,
ctrl-D the program. Several prompts (or --num) are written side by side, text r with seed + r, and as each would be alone.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import sys
import time
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING

from sickbay.core.errors import UsageError

if TYPE_CHECKING:
    from sickbay.reference.generation.complete import Completion, Piece, Writer
    from sickbay.reference.generation.decoding import Decoding

NAME = "generate"
PROMPT = "\n"
WEIGHTS = ("fp32", "fp16")
TEMPERATURE = 0.8
RULE = "-" * 40  # between texts


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The command's options stand in `parser`."""
    add = parser.add_argument
    add("checkpoint", metavar="MODEL", type=Path, help="a checkpoint of `sickbay train`, its run's folder, or a transformers folder")
    add("--prompt", action="append", metavar="TEXT", help="the text to go on from (a line end); several times: several texts")
    add("--prompt-file", type=Path, metavar="FILE", help="go on from the text of this file; - is the standard input")
    add("--tokens", type=int, default=500, metavar="N", help="how many to write at most (500)")
    add("--num", type=int, default=1, metavar="N", help="write N texts of each prompt (1)")
    add(
        "--stop", action="append", default=[], metavar="TEXT", help="end before this text, which is not written; may be given several times"
    )
    add("--seed", type=int, default=0, metavar="N", help="same seed, same text (0)")
    add("--temperature", type=float, metavar="X", help=f"0 = always the likeliest; 1 = the model's own ({TEMPERATURE})")
    add("--top-k", type=int, metavar="N", help="draw among the N likeliest only")
    add("--top-p", type=float, metavar="X", help="draw among the fewest that hold this probability")
    add("--min-p", type=float, metavar="X", help="draw among those at least X times as likely as the likeliest")
    add("--typical-p", type=float, metavar="X", help="draw among the fewest nearest to the entropy that hold this probability")
    add("--repetition-penalty", type=float, metavar="X", help="log-probabilities of tokens already there times this (1)")
    add("--presence-penalty", type=float, metavar="X", help="taken from the log-probabilities of tokens already there (0)")
    add("--frequency-penalty", type=float, metavar="X", help="the same for each time that they are there (0)")
    add("--no-repeat-ngram", type=int, metavar="N", help="no run of N tokens twice")
    add("--beams", type=int, metavar="N", help="search for the likeliest text with N beams instead of drawing")
    add("--length-penalty", type=float, metavar="X", help="beams: log-probability / length ** X is the best text's measure (1)")
    add("--early-stopping", action="store_true", help="beams: done when N texts have ended, though an open one may be better")
    add("--interactive", action="store_true", help="go on from each line that is typed or piped in")
    add("--device", metavar="DEVICE", help="where to compute (cuda where there is one, otherwise cpu)")
    add("--weights", choices=WEIGHTS, default="fp32", help="fp16: matrices are rounded, and read twice as fast; for the cpu (fp32)")
    add("--json", action="store_true", help="one JSON object a text on stdout: prompt, text, tokens, why it ended, seed, settings, seconds")


def main(args: argparse.Namespace) -> int:
    """0 when the text is written. Raises UsageError."""
    _demand_sensible(args)
    import torch

    from sickbay.reference.generation.complete import collect

    try:
        decoding = _decoding(args)
        prompts = [prompt for prompt in _prompts(args) for _ in range(args.num)]
        device = args.device or ("cuda" if torch.cuda.is_available() else "cpu")
        writer = load(args.checkpoint, device, args.weights)
        if args.interactive:
            from sickbay.cli.conversation import converse

            return converse(writer, args.tokens, decoding, args.seed, args.stop)
        if not writer.goes_on and args.prompt is None and args.prompt_file is None:
            raise UsageError(f"{args.checkpoint} holds an encoder-decoder, which writes to a source; give it with --prompt")
        started = time.perf_counter()
        if args.beams is not None:
            texts = _search(args, writer, prompts, decoding)
        else:
            pieces: Iterable[Piece] = writer.write(prompts, args.tokens, decoding, args.seed, args.stop)
            if len(prompts) == 1 and not args.json:
                sys.stdout.write(prompts[0] if writer.goes_on else "")
                pieces = _shown(pieces)
            texts = collect(prompts, pieces, args.seed)
    except RuntimeError as problem:
        raise UsageError(f"--device {args.device}: {str(problem).splitlines()[0]}") from problem
    except (OSError, ValueError) as problem:
        raise UsageError(f"{args.checkpoint}: {problem}" if str(args.checkpoint) not in str(problem) else f"{problem}") from problem
    if args.json:
        _print_json(texts, decoding, args, time.perf_counter() - started)
    elif len(prompts) == 1 and args.beams is None:
        print()
    else:
        print(f"\n{RULE}\n".join((completion.prompt if writer.goes_on else "") + completion.text for completion in texts))
    return 0


def load(path: Path, device: str, weights: str) -> Writer:
    """The model of the run, checkpoint or transformers folder at `path`, for writing alone, with its tokenizer.

    Raises OSError, ValueError, UsageError.
    """
    from sickbay.reference.generation.answer import answerer
    from sickbay.reference.generation.complete import Continuer
    from sickbay.reference.models import layout
    from sickbay.reference.models.encoder_decoder import EncoderDecoder
    from sickbay.reference.models.kinds import ENCODER, Model
    from sickbay.reference.saving import checkpoint
    from sickbay.reference.text import tokenizer

    model: Model
    writer: Writer
    if (path / "config.json").is_file():
        from sickbay.reference.models import pretrained

        decoder, file = pretrained.load(path)
        if file is None:
            raise UsageError(f"{path} has no tokenizer.json; save the model's tokenizer into it (tokenizer.save_pretrained)")
        model, writer = decoder, Continuer(decoder.to(device), tokenizer.load(file))
    else:
        state = checkpoint.read(path)
        if state.kind == ENCODER:
            raise UsageError(f"{state.folder} holds an encoder, which fills in masked tokens and writes no text; a decoder does")
        model = checkpoint.load_model(state, device, averaged=checkpoint.has_average(state))
        writer = answerer(state, model) if isinstance(model, EncoderDecoder) else Continuer(model, state.tokenizer)
    if weights == "fp16":
        layout.halve_weights(model)
    else:
        layout.lay_out_for_reading(model)
    return writer


def _demand_sensible(args: argparse.Namespace) -> None:
    for name in ("tokens", "num", "beams"):
        if getattr(args, name) is not None and getattr(args, name) < 1:
            raise UsageError(f"--{name} is {getattr(args, name)}; it must be at least 1")
    if not args.checkpoint.exists():
        raise UsageError(f"no checkpoint at {args.checkpoint}; `sickbay train TEXT` makes one and prints its path")
    if args.prompt is not None and args.prompt_file is not None:
        raise UsageError("--prompt and --prompt-file are both given; the text to go on from is one of them")
    drawn = [name for name in ("temperature", "top_k", "top_p", "min_p", "typical_p") if getattr(args, name) is not None]
    if args.beams is not None and drawn:
        raise UsageError(f"--beams draws nothing: leave out --{drawn[0].replace('_', '-')}, or --beams")
    searched = [
        name for name, given in (("length-penalty", args.length_penalty is not None), ("early-stopping", args.early_stopping)) if given
    ]
    if args.beams is None and searched:
        raise UsageError(f"--{searched[0]} is for --beams; give --beams N too, or leave it out")
    if args.beams is not None and (args.interactive or args.stop):
        raise UsageError("--beams writes texts whole: leave out --interactive and --stop")
    if args.beams is not None and args.num > args.beams:
        raise UsageError(f"--num is {args.num}; a search with --beams {args.beams} finds at most so many texts")
    if args.interactive and (args.prompt or args.prompt_file or args.num > 1 or args.json):
        raise UsageError("--interactive goes on from what is typed: leave out --prompt, --prompt-file, --num and --json")


def _decoding(args: argparse.Namespace) -> Decoding:
    from sickbay.reference.generation.decoding import Decoding

    given = {field.name: getattr(args, field.name) for field in dataclasses.fields(Decoding)}
    temperature = 0.0 if args.beams is not None else TEMPERATURE
    return Decoding(**{"temperature": temperature, **{name: value for name, value in given.items() if value is not None}})


def _prompts(args: argparse.Namespace) -> list[str]:
    if args.prompt_file is None:
        return args.prompt or [PROMPT]
    try:
        return [sys.stdin.read() if str(args.prompt_file) == "-" else args.prompt_file.read_text(encoding="utf-8")]
    except OSError as problem:
        raise UsageError(f"--prompt-file {args.prompt_file} cannot be read: {problem.strerror}") from problem
    except UnicodeDecodeError as problem:
        raise UsageError(f"--prompt-file {args.prompt_file} is not UTF-8 text: {problem}") from problem


def _shown(pieces: Iterable[Piece]) -> Iterable[Piece]:
    """The pieces, each on the terminal as it comes."""
    for piece in pieces:
        sys.stdout.write(piece.text)
        sys.stdout.flush()
        yield piece


def _search(args: argparse.Namespace, writer: Writer, prompts: list[str], decoding: Decoding) -> list[Completion]:
    """The best `--num` texts of each prompt, which `prompts` names so often."""
    from sickbay.reference.generation.beam import Beams

    beams = Beams(args.beams, 1.0 if args.length_penalty is None else args.length_penalty, args.early_stopping)
    return [text for texts in writer.search(prompts[:: args.num], args.tokens, beams, decoding) for text in texts[: args.num]]


def _print_json(texts: list[Completion], decoding: Decoding, args: argparse.Namespace, seconds: float) -> None:
    settings = {**dataclasses.asdict(decoding), "beams": args.beams, "stop": args.stop}
    for completion in texts:
        print(json.dumps({**dataclasses.asdict(completion), "seconds": seconds, "decoding": settings}))
