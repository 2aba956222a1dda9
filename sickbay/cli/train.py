"""Train the reference transformer on texts.

The defaults are nanoGPT's recipe for a CPU: 4 layers, 4 heads, 128 wide, context 64, 2000 steps of 12 rows, character by
character. --objective masked-token trains an encoder, span-corruption or pairs an encoder-decoder. A flag overrules --config,
that its --preset, that the defaults. The run's folder holds the checkpoint for `sickbay generate` and config.toml, all of its
settings; --resume goes on from it, bit for bit.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import json
import os
import shlex
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING

from sickbay.core.errors import UsageError

if TYPE_CHECKING:
    from sickbay.reference.data import Corpus
    from sickbay.reference.saving.checkpoint import State
    from sickbay.reference.settings.recipe import Objective
    from sickbay.reference.settings.settings import Settings, Tables
    from sickbay.reference.train import Result

NAME = "train"
# What a resumed run may change: it touches no number of the steps already taken.
FREE = ("steps", "eval_every", "save_every", "patience", "parallel")
PATHS = ("val", "cache", "translate_there", "translate_back")
TAKEN = ("context", "dropout", "pad_id")  # what a training may change of a trained model's shape
MADE = ("chars", "bytes", "bpe")  # tokenizers that are no path


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The command's options stand in `parser`."""
    from sickbay.reference.settings import flags
    from sickbay.reference.settings.presets import PRESETS

    parser.usage = "sickbay train [TEXT ...] [--preset NAME] [--config FILE] [--out DIR] [any setting below]"
    parser.add_argument("text", metavar="TEXT", nargs="*", help="UTF-8 text files, JSONL files, folders of them, or - for stdin")
    parser.add_argument("--config", metavar="FILE", type=Path, help="settings as TOML, such as the config.toml of an earlier run")
    parser.add_argument("--preset", choices=tuple(PRESETS), help="settings under one name")
    parser.add_argument("--out", metavar="DIR", type=Path, help="the run's folder (sickbay-runs/<time>-train)")
    parser.add_argument("--resume", action="store_true", help="go on from the newest checkpoint in --out")
    parser.add_argument(
        "--find-lr", action="store_true", help="try learning rates on a model that is thrown away, print a table, train nothing"
    )
    parser.add_argument("--device", help="torch device (cuda where there is one, else cpu)")
    parser.add_argument("--watch", action="store_true", help="let sickbay watch the loop")
    parser.add_argument("--json", action="store_true", help="the result as JSON on stdout")
    flags.add_flags(parser)
    parser.add_argument("--untied", dest="tied_embeddings", action="store_false", default=None, help="--no-tied-embeddings")


def main(args: argparse.Namespace) -> int:
    """0 when the model is trained and saved, 1 when its loss is no longer finite. Raises UsageError."""
    from sickbay.reference.settings import settings as settings_of

    asked, texts = _asked(args)
    if args.resume and args.out is None:
        raise UsageError("--resume needs --out DIR, the folder of the run to go on from")
    if args.out is None and int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise UsageError("several processes need --out DIR, one folder that all of them can write")
    out = args.out or Path("sickbay-runs") / f"{time.strftime('%Y%m%d-%H%M%S')}-train"
    earlier = None if args.find_lr else _earlier(out, args.resume)

    from sickbay.reference import train
    from sickbay.reference.data.tasks import demand_together
    from sickbay.reference.processes.world import together
    from sickbay.reference.training.interrupt import Stopped
    from sickbay.reference.training.precision import slow_here

    try:
        # The whole command is checked before anything is written.
        settings = settings_of.checked(asked, texts) if earlier is None else _continued(earlier, out, asked, texts)
        demand_together(settings.model, settings.recipe, settings.data)
        if not settings.texts:
            raise UsageError("no text to train on; give a text file: sickbay train TEXT")
        device = _device(args.device)
        if slow := slow_here(settings.recipe.precision, device):
            print(f"note: {slow}", file=sys.stderr)
        steps, warmup = settings.recipe.steps, settings.recipe.warmup
        if warmup >= steps:
            print(f"note: warmup is {warmup}, the run has {steps} steps: the learning rate never gets to its peak", file=sys.stderr)
        if args.find_lr:
            return _find_learning_rate(settings, asked, device, args.json)
        with together(settings.recipe.parallel, device, settings.recipe.batch_size) as world:
            with world.first_alone():  # the others find what it has prepared
                if earlier is None and settings.recipe.from_pretrained is not None:
                    settings = _shaped_as_trained(settings, asked)
                corpus = _corpus(settings, out, earlier)
                if earlier is None:
                    settings = _with_precision(_with_vocabulary(settings, asked, corpus), world.device)
                if world.first:
                    if settings.recipe.precision == "bf16" and "precision" not in asked["recipe"]:
                        print("note: products in bf16, which are faster here; --precision fp32 computes them in full", file=sys.stderr)
                    out.mkdir(parents=True, exist_ok=True)
                    settings_of.write(settings, out / settings_of.FILE)
            try:
                result = train.train(
                    corpus,
                    settings.model,
                    settings.recipe,
                    out,
                    texts=settings.data,
                    resume=earlier,
                    device=world.device,
                    watch=args.watch,
                    world=world,
                )
            except (UsageError, ValueError):  # refused before the first step
                if world.first and earlier is None:
                    _forget(out)
                raise
    except ValueError as problem:
        raise UsageError(str(problem)) from problem
    except OSError as problem:
        raise UsageError(
            f"{out} cannot be written: {problem.strerror}; --resume goes on from its newest checkpoint once it can"
        ) from problem
    except FloatingPointError as problem:
        print(f"sickbay train: {problem}; `sickbay run -m sickbay train ...` finds the cause, a lower --lr often helps", file=sys.stderr)
        return 1
    except Stopped as stopped:
        if world.first:
            print(f"{stopped}; go on with it: sickbay train --out {out} --resume", file=sys.stderr)
        return 128 + stopped.signal
    if not world.first:
        return 0
    if args.json:
        print(json.dumps(dataclasses.asdict(result)))
    else:
        _show_card(settings, out, corpus, result, device)
    return 0


def _show_card(settings: Settings, out: Path, corpus: Corpus, result: Result, device: str) -> None:
    """The card of the run stands on stdout."""
    from sickbay.reference.data.tasks import task_of
    from sickbay.reference.evaluation import card, closing
    from sickbay.reference.evaluation.evaluation import Evaluation
    from sickbay.reference.saving import checkpoint
    from sickbay.reference.training.schedule import scheduled

    recipe, task = settings.recipe, task_of(corpus, settings.model, settings.recipe, settings.data)
    twice = dataclasses.replace(recipe, steps=2 * recipe.steps)
    last, next_one = scheduled(recipe, result.steps - 1), scheduled(twice, result.steps)
    meaning = f"train on, the learning rate at {next_one:.1e} again" if last < next_one else "train on"
    model = checkpoint.load_model(checkpoint.read(Path(result.checkpoint)), device, averaged=recipe.ema is not None)
    on = f"sickbay train --out {shlex.quote(str(out))} --resume --steps {twice.steps}"
    training = closing.Training(
        ", ".join(Path(text).name for text in settings.texts),
        result.steps,
        recipe.batch_size * recipe.accumulation * task.tokens_per_row,
        result.seconds,
        result.tokens_per_second,
        result.history,
        [*_writing(recipe.objective, result.checkpoint), (on, meaning)],
        last / recipe.learning_rate,
    )
    evaluated = Evaluation(result.val_loss, result.val_error, result.val_tokens, result.val_accuracy)
    card.show(closing.close(training, model, task, evaluated))


def _writing(objective: Objective, checkpoint: str) -> list[tuple[str, str]]:
    """The command, if there is one, that has the trained model write, and what it does."""
    command = f"sickbay generate {shlex.quote(checkpoint)}"
    return {
        "next-token": [(command, "write more")],
        "masked-token": [],
        "span-corruption": [(f"{command} --prompt 'TEXT<0>TEXT'", "fill in what is missing at <0>")],
        "pairs": [(f"{command} --prompt SOURCE", "write a target")],
    }[objective]


def _asked(args: argparse.Namespace) -> tuple[Tables, tuple[str, ...]]:
    """(the settings asked for, each by the highest that names it, the texts). Raises UsageError."""
    from sickbay.reference.settings import flags, settings
    from sickbay.reference.settings.presets import PRESETS

    tables, texts, preset = settings.read(args.config) if args.config else ({}, (), None)
    preset = args.preset or preset
    asked = settings.layered(PRESETS[preset] if preset else {}, tables, flags.given(args))
    if asked["recipe"].get("clip") == 0:
        asked["recipe"]["clip"] = None  # another word for never
    # Whole paths: the config.toml that keeps them is used from anywhere.
    if asked["recipe"].get("from_pretrained") is not None:
        asked["recipe"]["from_pretrained"] = os.path.abspath(asked["recipe"]["from_pretrained"])
    for field, value in asked["data"].items():
        if value is not None and (field in PATHS or (field == "tokenizer" and value not in MADE)):
            asked["data"][field] = os.path.abspath(value)
    return asked, tuple(text if text == "-" else os.path.abspath(text) for text in args.text or texts)


def _earlier(out: Path, resume: bool) -> State | None:
    """The checkpoint to go on from, None for a new run. Raises UsageError where the two cannot be told apart safely."""
    from sickbay.reference.saving import checkpoint

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


def _continued(earlier: State, out: Path, asked: Tables, texts: tuple[str, ...]) -> Settings:
    """The settings of `earlier`, only --steps (and what does not touch the numbers) changed. Raises UsageError otherwise."""
    from sickbay.reference.settings import settings

    kept, kept_texts, _ = settings.read(out / settings.FILE) if (out / settings.FILE).is_file() else ({}, (), None)
    recorded = {**kept, "model": dataclasses.asdict(earlier.config), "recipe": earlier.recipe}
    whole = settings.layered({table: dataclasses.asdict(held()) for table, held in settings.TABLES.items()}, recorded)
    changed = [
        f"{field} was {whole[table][field]}"
        for table, fields in asked.items()
        for field, value in fields.items()
        if field not in (*FREE, *PATHS) and whole[table][field] != value
    ]
    if changed:
        raise UsageError(
            f"a resumed run keeps its model and recipe ({', '.join(changed)}); leave the option out, or start anew with another --out"
        )
    freed = {"recipe": {field: value for field, value in asked["recipe"].items() if field in FREE}}
    paths = {"data": {field: value for field, value in asked["data"].items() if field in PATHS}}
    found = settings.checked(settings.layered(recorded, freed, paths), texts or kept_texts)
    if found.recipe.steps <= earlier.step:
        raise UsageError(f"{earlier.folder} has all of its {found.recipe.steps} steps; a larger --steps goes on")
    return found


def _corpus(settings: Settings, out: Path, earlier: State | None) -> Corpus:
    """The texts' tokens, kept beside the run's folder. Raises UsageError where a text or the folder cannot be used."""
    from sickbay.reference import data

    tokenizer, source = (None, None) if earlier is None else (earlier.tokenizer, earlier.source)
    places = [Path(text) for text in settings.texts]
    cache = out.parent / "tokens" if settings.data.cache is None else Path(settings.data.cache)
    try:
        out.mkdir(parents=True, exist_ok=True)
        pairs = settings.recipe.objective == "pairs"
        context = 0 if pairs else settings.model.context
        return data.prepare(places, cache, settings.data, tokenizer, expected=source, context=context, pairs=pairs)
    except OSError as problem:
        raise UsageError(f"{problem.filename or places[0]}: {problem.strerror}; choose a readable TEXT and a writable --out") from problem
    finally:
        with contextlib.suppress(OSError):
            out.rmdir()  # only where it is empty


def _forget(out: Path) -> None:
    """The folder of a run that never began is as it was."""
    from sickbay.reference.settings.settings import FILE

    (out / FILE).unlink(missing_ok=True)
    with contextlib.suppress(OSError):
        out.rmdir()  # only where it is empty


def _shaped_as_trained(settings: Settings, asked: Tables) -> Settings:
    """`settings` with shape and tokenizer of the trained model it starts from. Raises UsageError where another shape was asked for."""
    from sickbay.reference.training import start

    folder = Path(settings.recipe.from_pretrained or "")
    shape, tokenizer = start.shape_of(folder, settings.recipe.objective)
    own = dataclasses.asdict(shape)
    changed = [f"{field} is {own[field]}" for field, value in asked["model"].items() if field not in TAKEN and value != own[field]]
    if changed:
        raise UsageError(f"{folder} has a shape of its own ({', '.join(changed)}); leave the option out, or --from-pretrained")
    if tokenizer is None and "tokenizer" not in asked["data"]:
        raise UsageError(f"{folder} has no tokenizer.json; name the one it was trained with: --tokenizer PATH")
    taken = {field: asked["model"][field] for field in TAKEN if field in asked["model"]}
    asked["model"]["vocab_size"] = shape.vocab_size
    chosen = asked["data"].get("tokenizer", str(tokenizer))
    return dataclasses.replace(
        settings, model=dataclasses.replace(shape, **taken), data=dataclasses.replace(settings.data, tokenizer=chosen)
    )


def _with_vocabulary(settings: Settings, asked: Tables, corpus: Corpus) -> Settings:
    """`settings` with the ids of tokenizer and objective, or the more that were asked for. Raises UsageError where fewer were."""
    from sickbay.reference.data.pairs import Translation
    from sickbay.reference.data.tasks import objective_of

    objective = objective_of(settings.recipe, settings.model, corpus.tokenizer)
    ids, more = corpus.tokenizer.vocab_size, objective.extra_ids
    size = asked["model"].get("vocab_size", ids + more)
    if size < ids + more:
        needed = f"{ids + more}, the tokenizer's ids" + (f" and {more} of {settings.recipe.objective}" if more else "")
        own = settings.recipe.from_pretrained is not None
        way_out = "the trained model has no more: keep to its context and objective" if own else "leave it out to take them all"
        raise UsageError(f"vocab_size is {size}; it must be at least {needed}; {way_out}")
    shape = dataclasses.replace(settings.model, vocab_size=size)
    if isinstance(objective, Translation):
        if asked["model"].get("pad_id", objective.pad_id) != objective.pad_id:
            raise UsageError(f"pad_id is {asked['model']['pad_id']}; it must be left out with objective=pairs, which adds one")
        shape = dataclasses.replace(shape, pad_id=objective.pad_id)
    return dataclasses.replace(settings, model=shape)


def _with_precision(settings: Settings, device: str) -> Settings:
    """`settings` with the precision that "auto" stands for on this machine."""
    from sickbay.reference.training.precision import settled

    precision = settled(settings.recipe.precision, settings.model.dim, device)
    return dataclasses.replace(settings, recipe=dataclasses.replace(settings.recipe, precision=precision))


def _find_learning_rate(settings: Settings, asked: Tables, device: str, as_json: bool) -> int:
    """0 when the table of tried learning rates is printed; nothing is kept."""
    import tempfile

    from sickbay.reference.training import find_lr

    with tempfile.TemporaryDirectory() as folder:
        corpus = _corpus(settings, Path(folder) / "run", None)
        settings = _with_vocabulary(settings, asked, corpus)
        found = find_lr.find_learning_rate(corpus, settings, device)
    if as_json:
        print(json.dumps(dataclasses.asdict(found)))
        return 0
    print("learning rate    loss (smoothed)")
    for trial in found.rows():
        print(f"{trial.learning_rate:>13.1e}    {trial.smoothed:.4f}{'  <- lowest' if trial == found.lowest else ''}")
    print(found.advice())
    return 0


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
