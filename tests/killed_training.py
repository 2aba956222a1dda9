"""A training killed again and again, and one that is left alone: run as a script, it prints what became of both as JSON.

    python killed_training.py FOLDER KILLS SEED

The one left alone runs in this process; every life of the other is a fork of it, so that torch is imported once. A life tells
its steps and the stages of its saves through a pipe; the parent kills it (SIGKILL) at one drawn at random, the next resumes.
"""

from __future__ import annotations

import json
import os
import random
import signal
import sys
import time
import traceback
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file

from sickbay.reference import data, train
from sickbay.reference.models.config import Config
from sickbay.reference.saving import checkpoint, durable
from sickbay.reference.settings.recipe import Recipe

STEPS, SAVE_EVERY = 60, 2
STAGE = 0.002  # seconds that each stage of a slowed save takes
CONFIG = {"dim": 8, "num_layers": 1, "num_heads": 2, "context": 8, "dropout": 0.2}
RECIPE = Recipe(steps=STEPS, batch_size=2, accumulation=2, optimizer="muon", ema=0.9, warmup=3, eval_every=0, save_every=SAVE_EVERY, seed=3)


def live(corpus: data.Corpus, out: Path, losses: Path, tell: int | None) -> None:
    """Trains in `out` from its newest checkpoint to the end; each micro-batch's loss goes to `losses`, stages to the pipe `tell`."""
    earlier = checkpoint.read(out, tell=lambda text: None) if list(out.glob("step-*")) else None
    number = 0 if earlier is None else earlier.step * RECIPE.accumulation
    backward, flush, checksum = train.backward, durable.flush, durable.checksum
    record = losses.open("a")

    def recording(loss: torch.Tensor, share: float) -> None:
        nonlocal number
        record.write(f"{number} {loss.item().hex()}\n")
        record.flush()
        number += 1
        if tell is not None:
            os.write(tell, b"t")
        backward(loss, share)

    def slow(stage: Any) -> Any:
        def staged(path: Path) -> Any:
            if tell is not None:
                os.write(tell, b"s")
                time.sleep(STAGE)
            return stage(path)

        return staged

    train.backward, durable.flush, durable.checksum = recording, slow(flush), slow(checksum)
    config = Config(**CONFIG, vocab_size=corpus.tokenizer.vocab_size)
    try:
        train.train(corpus, config, RECIPE, out, resume=earlier)
    finally:
        train.backward, durable.flush, durable.checksum = backward, flush, checksum


def fork(corpus: data.Corpus, out: Path, losses: Path, stop_at: tuple[bytes, int, float] | None) -> bool:
    """Whether a life ended by itself; `stop_at`: kind of stage, how many of them, seconds after it until the kill."""
    reads, writes = os.pipe()
    child = os.fork()
    if child == 0:
        try:
            os.close(reads)
            os.dup2(os.open(os.devnull, os.O_WRONLY), 2)
            live(corpus, out, losses, writes if stop_at else None)
            os._exit(0)
        except BaseException:
            print(traceback.format_exc())
            os._exit(1)
    os.close(writes)
    if stop_at is not None:
        kind, count, delay = stop_at
        while count and (told := os.read(reads, 1)):
            count -= told == kind
        time.sleep(delay)
        os.kill(child, signal.SIGKILL)
    os.close(reads)
    _, status = os.waitpid(child, 0)
    if os.WIFEXITED(status) and os.WEXITSTATUS(status):
        raise SystemExit("a life ended with an error")
    return os.WIFEXITED(status)


def told_losses(file: Path) -> tuple[dict[int, str], int]:
    """(loss of each micro-batch, how many were told differently by two lives); a line cut by a kill is no loss."""
    losses: dict[int, str] = {}
    differ = 0
    for line in file.read_text().splitlines(keepends=True):
        if line.endswith("\n") and len(words := line.split()) == 2:
            differ += losses.setdefault(int(words[0]), words[1]) != words[1]
    return losses, differ


def values(folder: Path) -> dict[str, torch.Tensor]:
    return {f"{file.name}.{key}": value for file in folder.glob("*.safetensors") for key, value in load_file(file).items()}


def main(folder: Path, kills: int, seed: int) -> dict[str, Any]:
    torch.set_num_threads(1)
    draw = random.Random(seed)
    text = folder / "text.txt"
    text.write_text(data.shipped_text().read_text(encoding="utf-8")[:3000], encoding="utf-8")
    corpus = data.prepare([text], folder / "tokens", data.DataSettings())
    live(corpus, folder / "whole", folder / "whole.txt", None)
    killed = in_save = 0
    for life in range(kills):
        in_save_wanted = life % 2 == 0
        # A save has about 25 stages; the first life is killed before there is any checkpoint.
        stages = 1 if life == 0 else draw.randint(1, 35) if in_save_wanted else draw.randint(1, 7)
        stop_at = (b"s" if in_save_wanted else b"t", stages, draw.uniform(0, STAGE / 2) if in_save_wanted else draw.uniform(0, 0.01))
        if not fork(corpus, folder / "killed", folder / "killed.txt", stop_at):
            killed += 1
            in_save += any((folder / "killed").glob(f"{durable.PARTIAL}*"))
    ended = fork(corpus, folder / "killed", folder / "killed.txt", None)
    whole, resumed = (checkpoint.find(folder / name) for name in ("whole", "killed"))
    expected, found = values(whole), values(resumed)
    losses, _ = told_losses(folder / "whole.txt")
    again, differ = told_losses(folder / "killed.txt")
    return {
        "ended": ended,
        "kills": killed,
        "kills_in_a_save": in_save,
        "same_names": expected.keys() == found.keys(),
        "steps": [whole.name, resumed.name],
        "values": len(expected),
        "values_that_differ": [key for key in expected if not torch.equal(expected[key], found[key])],
        "losses": len(losses),
        "losses_that_differ": differ + sum(again.get(number) != loss for number, loss in losses.items()),
    }


if __name__ == "__main__":
    print(json.dumps(main(Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3]))))
