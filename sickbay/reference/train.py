"""Training the reference: the pieces of one optimizer step, and the loop."""

from __future__ import annotations

import dataclasses
import itertools
import math
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from sickbay.reference.data.corpus import Corpus
from sickbay.reference.data.tasks import on, task_of
from sickbay.reference.evaluation.evaluation import Evaluation, evaluate
from sickbay.reference.models.config import Config
from sickbay.reference.models.parts import Keeper, begin
from sickbay.reference.processes.parallel import accumulating, clip_gradients
from sickbay.reference.processes.world import ALONE, World
from sickbay.reference.saving import checkpoint
from sickbay.reference.settings.data_settings import DataSettings
from sickbay.reference.settings.recipe import Recipe
from sickbay.reference.training.interrupt import Stopped, on_request
from sickbay.reference.training.loss import prediction_loss, token_shares
from sickbay.reference.training.machine import processor
from sickbay.reference.training.optimizer import set_learning_rate
from sickbay.reference.training.precision import autocast, settled
from sickbay.reference.training.progress import Progress
from sickbay.reference.training.schedule import scheduled

BEST = "best"  # folder in the run's folder for the checkpoint of the lowest validation loss


def backward(loss: Tensor, share: float) -> None:
    """The gradients of `share` x `loss` have been added to those the parameters hold."""
    (loss * share).backward()


def update(model: nn.Module, optimizer: torch.optim.Optimizer, clip: float | None, scaler: torch.amp.GradScaler | None = None) -> None:
    """One optimizer step has been taken from the accumulated gradients, clipped to global L2 norm `clip`, and they are gone.

    `scaler`: the one that scaled the loss; it leaves out a step whose gradients are not finite.
    """
    if scaler is not None:
        scaler.unscale_(optimizer)  # before clipping, whose limit is meant for the true norm
    if clip is not None:
        clip_gradients(model.parameters(), clip)
    if scaler is not None:
        scaler.step(optimizer)
        scaler.update()
    else:
        optimizer.step()
    optimizer.zero_grad(set_to_none=True)


@dataclass(frozen=True)
class Result:
    """What a run came to. Losses in nats per token; `val_loss` over the whole validation split, of what `checkpoint` holds.

    `val_error`: its standard error; `val_tokens`: the targets it is the mean over; `val_accuracy`: the share of them found likeliest.
    `bits_per_byte`: of the text; None where an objective asks for other things than the text. `tokens_per_second`: of the steps alone;
    `seconds`: with evaluations and checkpoints. `history`: (step, validation loss) of the evaluations under way since the last start.
    """

    checkpoint: str
    steps: int
    train_loss: float
    val_loss: float
    val_error: float
    val_tokens: int
    val_accuracy: float
    bits_per_byte: float | None
    tokens_per_second: float
    seconds: float
    parameters: int
    history: tuple[tuple[int, float], ...]


def train(
    corpus: Corpus,
    config: Config,
    recipe: Recipe,
    out: Path,
    *,
    texts: DataSettings | None = None,
    resume: checkpoint.State | None = None,
    device: str = "cpu",
    watch: bool = False,
    world: World = ALONE,
) -> Result:
    """`out` holds the checkpoint of a model trained by `recipe`, its progress told on stderr.

    The recipe's objective decides the kind of model. `texts`: how `corpus` becomes batches. `resume`: the checkpoint to go on from;
    the weights at the end are bit-equal to those of a run that never stopped. `world`: the processes that train together, each of
    which calls this.
    Raises ValueError (too little text), FloatingPointError (the loss is not finite), Stopped (by a signal, with a checkpoint),
    OSError (at the end, where the last checkpoint could not be written).
    """
    recipe = dataclasses.replace(recipe, precision=settled(recipe.precision, config.dim, device))
    task = task_of(corpus, config, recipe, texts)
    parts = begin(config, recipe, resume, world, device)
    first = parts.steps
    batches = on(device, task.training(first * recipe.accumulation, world.rows))
    progress = Progress(
        first,
        recipe,
        tokens_per_step=recipe.batch_size * recipe.accumulation * task.tokens_per_row,
        bytes_per_token=task.bytes_per_token,
        speaks=world.first,
    )
    keeper = Keeper(parts, recipe, corpus, world, lambda text: progress.say(parts.steps, text))
    train_loss, newest, best = math.nan, None if resume is None else resume.folder, None
    shows = world.most(progress.every)
    history: list[tuple[int, float]] = []

    def validate(model: nn.Module, most_rows: int | None = None) -> Evaluation:
        return evaluate(model, on(device, task.spread("val", most_rows, world.rows)), config.pad_id, world)

    with (
        processor(recipe.threads, recipe.flush_denormal),
        watching(parts.model, parts.optimizer) if watch else nullcontext(),
        on_request(world.first) as request,
    ):
        for step in range(first, recipe.steps):
            set_learning_rate(parts.optimizer, scheduled(recipe, step))
            cycle = list(itertools.islice(batches, recipe.accumulation))
            step_loss = torch.zeros((), device=device)
            for number, (batch, share) in enumerate(zip(cycle, token_shares(cycle, config.pad_id, world)), 1):
                with autocast(recipe.precision, device), accumulating(parts.net, last=number == len(cycle)):
                    loss = prediction_loss(parts.net, batch, config.pad_id, recipe.label_smoothing, recipe.z_loss)
                backward(parts.scaler.scale(loss), share)
                step_loss += loss.detach() * share
            update(parts.model, parts.optimizer, recipe.clip, parts.scaler)
            if parts.average is not None:
                parts.average.update_parameters(parts.model)
            parts.steps = done = step + 1

            last, stopped_by = done == recipe.steps, world.most(request.signal)
            saves = last or bool(stopped_by) or is_due(done, recipe.save_every)
            evaluates = (last and recipe.patience is not None) or (not last and is_due(done, recipe.eval_every))
            if saves or evaluates or done % shows == 0:
                train_loss = world.sum(step_loss.item())[0] / world.shards  # waits for the device: not in every step
                progress.show(done, train_loss)
                if not math.isfinite(train_loss):
                    raise FloatingPointError(f"the loss is {train_loss} at step {done}")
            if evaluates:
                with progress.aside():
                    val_loss = validate(parts.judged, recipe.eval_rows).loss
                progress.show_validation(done, val_loss)
                history.append((done, val_loss))
                if parts.patience.improves(val_loss) and recipe.patience is not None:
                    best = keeper.save(out / BEST, best, keep=1)
            stops = evaluates and parts.patience.over
            if saves or stops:
                with progress.aside():
                    newest = keeper.save(out, newest)
            if stopped_by and not last:
                raise Stopped(stopped_by, done, newest, keeper.problem)
            if stops:
                progress.say(done, f"stops: {parts.patience.waited} evaluations without a loss below {parts.patience.best:.4f}")
                break

        seconds, speed = progress.seconds(), progress.tokens_per_second(parts.steps)
        judged, chosen = parts.judged, newest
        if recipe.patience is not None and (out / BEST).is_dir():  # a resumed run's may be older than the resumption
            chosen = checkpoint.find(out / BEST)
            judged = checkpoint.load_model(checkpoint.read(chosen), device, averaged=parts.average is not None)
        validation = validate(judged)
    progress.show_validation(parts.steps, validation.loss)
    if keeper.problem is not None:
        raise keeper.problem
    parameters = sum(parameter.numel() for parameter in parts.model.parameters())
    return Result(
        str(chosen),
        parts.steps,
        train_loss,
        validation.loss,
        validation.error,
        validation.tokens,
        validation.accuracy,
        progress.bits_per_byte(validation.loss),
        speed,
        seconds,
        parameters,
        tuple(history),
    )


def is_due(done: int, every: int) -> bool:
    """Whether something that happens `every` so many steps (0 = never) happens after `done` of them."""
    return every > 0 and done % every == 0


def watching(model: nn.Module, optimizer: torch.optim.Optimizer) -> AbstractContextManager[Any]:
    """sickbay's own eyes on the loop."""
    import sickbay

    watched: AbstractContextManager[Any] = sickbay.watch(model, optimizer)
    return watched
