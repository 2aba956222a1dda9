"""Training the reference: the pieces of one optimizer step, and the loop."""

from __future__ import annotations

import dataclasses
import itertools
import math
import sys
import time
from collections.abc import Iterable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from sickbay.reference import checkpoint, data
from sickbay.reference.config import Config
from sickbay.reference.model import Transformer
from sickbay.reference.optimizer import make_optimizer, set_learning_rate
from sickbay.reference.recipe import Recipe
from sickbay.reference.schedule import scheduled

IGNORED = -100


def counted(targets: Tensor, pad_id: int | None) -> Tensor:
    """`targets` with padding replaced by the id that the loss ignores."""
    return targets if pad_id is None else targets.masked_fill(targets == pad_id, IGNORED)


def next_token_loss(model: nn.Module, ids_BT: Tensor, targets_BT: Tensor, pad_id: int | None = None) -> Tensor:
    """Mean cross-entropy in nats over the targets that are neither `pad_id` nor -100; scalar."""
    logits_BTV = model(ids_BT)
    return functional.cross_entropy(logits_BTV.flatten(0, 1), counted(targets_BT, pad_id).flatten(), ignore_index=IGNORED)


def token_shares(cycle: Sequence[data.Batch], pad_id: int | None = None) -> list[float]:
    """Each micro-batch's share of the counted targets of one step: the weights that make accumulation equal to one joined batch."""
    counts = [int((counted(targets, pad_id) != IGNORED).sum()) for _, targets in cycle]
    total = sum(counts)
    return [count / total for count in counts] if total else [1 / len(cycle)] * len(cycle)


def backward(loss: Tensor, share: float) -> None:
    """The gradients of `share` x `loss` have been added to those the parameters hold."""
    (loss * share).backward()


def update(model: nn.Module, optimizer: torch.optim.Optimizer, clip: float | None) -> None:
    """One optimizer step has been taken from the accumulated gradients, clipped to global L2 norm `clip`, and they are gone."""
    if clip is not None:
        nn.utils.clip_grad_norm_(model.parameters(), clip)
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)


def evaluate(model: nn.Module, batches: Iterable[data.Batch], pad_id: int | None = None) -> float:
    """Mean loss in nats over all counted targets of `batches`, without dropout and gradients; the model is in training mode after."""
    model.eval()
    total, tokens = 0.0, 0
    with torch.no_grad():
        for ids, targets in batches:
            count = int((counted(targets, pad_id) != IGNORED).sum())
            total += next_token_loss(model, ids, targets, pad_id).item() * count
            tokens += count
    model.train()
    return total / tokens if tokens else math.nan


@dataclass(frozen=True)
class Result:
    """What a run came to. Losses in nats per token; `val_loss` over the whole validation split."""

    checkpoint: str
    steps: int
    train_loss: float
    val_loss: float
    bits_per_byte: float
    tokens_per_second: float
    seconds: float
    parameters: int


def train(
    corpus: data.Corpus,
    config: Config,
    recipe: Recipe,
    out: Path,
    *,
    resume: checkpoint.State | None = None,
    device: str = "cpu",
    watch: bool = False,
) -> Result:
    """`out` holds the checkpoint of a model trained by `recipe`, its progress told on stderr.

    `resume`: the checkpoint to go on from; the weights at the end are bit-equal to those of a run that never stopped.
    Raises ValueError (too little text), FloatingPointError (the loss is not finite), OSError.
    """
    train_tokens, val_tokens = data.split(corpus.tokens, "train"), data.split(corpus.tokens, "val")
    for tokens, part in ((train_tokens, "train"), (val_tokens, "validation")):
        data.demand_length(tokens, config.context, part)
    torch.manual_seed(recipe.seed)
    model = Transformer(config).to(device) if resume is None else checkpoint.load_weights(resume, device)
    optimizer = make_optimizer(model, recipe)
    if resume is not None:
        checkpoint.restore(resume, model, optimizer)
    first = 0 if resume is None else resume.step
    batches = data.random_batches(train_tokens, config.context, recipe.batch_size, recipe.seed, first * recipe.accumulation)
    progress = Progress(
        first, recipe, tokens_per_step=recipe.batch_size * recipe.accumulation * config.context, bytes_per_token=corpus.bytes_per_token
    )
    train_loss, folder = math.nan, out

    with watching(model, optimizer) if watch else nullcontext():
        for step in range(first, recipe.steps):
            cycle = [(ids.to(device), targets.to(device)) for ids, targets in itertools.islice(batches, recipe.accumulation)]
            set_learning_rate(optimizer, scheduled(recipe, step))
            step_loss = torch.zeros((), device=device)
            for (ids_BT, targets_BT), share in zip(cycle, token_shares(cycle, config.pad_id)):
                loss = next_token_loss(model, ids_BT, targets_BT, config.pad_id)
                backward(loss, share)
                step_loss += loss.detach() * share
            update(model, optimizer, recipe.clip)

            done, last = step + 1, step + 1 == recipe.steps
            saves = last or (recipe.save_every > 0 and done % recipe.save_every == 0)
            if saves or done % progress.every == 0:
                train_loss = step_loss.item()  # waits for the device: not in every step
                progress.show(done, train_loss)
                if not math.isfinite(train_loss):
                    raise FloatingPointError(f"the loss is {train_loss} at step {done}")
            if recipe.eval_every and done % recipe.eval_every == 0 and not last:
                rows = data.spread_batches(val_tokens, config.context, recipe.batch_size, recipe.eval_rows)
                progress.show_validation(done, evaluate(model, on(device, rows), config.pad_id))
            if saves:
                folder = checkpoint.save(
                    out,
                    step=done,
                    model=model,
                    optimizer=optimizer,
                    recipe=dataclasses.asdict(recipe),
                    source=corpus.source,
                    tokenizer=corpus.tokenizer,
                )

        seconds, speed = progress.seconds(), progress.tokens_per_second(recipe.steps)
        val_loss = evaluate(model, on(device, data.spread_batches(val_tokens, config.context, recipe.batch_size)), config.pad_id)
    progress.show_validation(recipe.steps, val_loss)
    parameters = sum(parameter.numel() for parameter in model.parameters())
    return Result(str(folder), recipe.steps, train_loss, val_loss, progress.bits_per_byte(val_loss), speed, seconds, parameters)


def on(device: str, batches: Iterable[data.Batch]) -> Iterable[data.Batch]:
    """`batches`, each moved to `device` when it is asked for."""
    return ((ids.to(device), targets.to(device)) for ids, targets in batches)


def watching(model: nn.Module, optimizer: torch.optim.Optimizer) -> AbstractContextManager[Any]:
    """sickbay's own eyes on the loop."""
    import sickbay

    watched: AbstractContextManager[Any] = sickbay.watch(model, optimizer)
    return watched


class Progress:
    """One line on stderr, rewritten in place on a terminal and repeated now and then elsewhere. `every`: steps between two."""

    def __init__(self, first: int, recipe: Recipe, *, tokens_per_step: int, bytes_per_token: float) -> None:
        self.terminal = sys.stderr.isatty()
        self.every = 10 if self.terminal else 100
        self._first, self._steps = first, recipe.steps
        self._tokens_per_step, self._bytes_per_token = tokens_per_step, bytes_per_token
        self._started = time.perf_counter()

    def seconds(self) -> float:
        return time.perf_counter() - self._started

    def tokens_per_second(self, done: int) -> float:
        """Since the start, evaluations and checkpoints included."""
        return (done - self._first) * self._tokens_per_step / max(self.seconds(), 1e-9)

    def bits_per_byte(self, loss: float) -> float:
        """`loss` nats per token in bits per UTF-8 byte of the text, which does not depend on the tokenizer."""
        return loss / math.log(2) / self._bytes_per_token

    def show(self, done: int, loss: float) -> None:
        left = (self._steps - done) * self.seconds() / (done - self._first)
        speed = f"{self.tokens_per_second(done):,.0f} tokens/s  ETA {clock(left)}"
        numbers = f"loss {loss:.4f}  {self.bits_per_byte(loss):.3f} bits per byte  {speed}"
        self._write(done, numbers, stays=done == self._steps)

    def show_validation(self, done: int, loss: float) -> None:
        self._write(done, f"validation loss {loss:.4f}  {self.bits_per_byte(loss):.3f} bits per byte", stays=True)

    def _write(self, done: int, numbers: str, stays: bool) -> None:
        text = f"step {done:,}/{self._steps:,}  {numbers}"
        clear, end = ("\r\x1b[K", "\n" if stays else "") if self.terminal else ("", "\n")
        print(f"{clear}{text}", end=end, file=sys.stderr, flush=True)


def clock(seconds: float) -> str:
    """Minutes and seconds, `m:ss`, or `h:mm:ss` from an hour on."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{rest:02d}" if hours else f"{minutes}:{rest:02d}"
