"""What is examined once a training has ended: the numbers of its card."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from sickbay.reference.data.batches import Tokens
from sickbay.reference.data.objectives import NextToken
from sickbay.reference.data.tasks import Part, Task, on
from sickbay.reference.evaluation.card import Closing, Sample
from sickbay.reference.evaluation.evaluation import Baselines, Evaluation, baselines, evaluate, manner
from sickbay.reference.evaluation.flops import measured_peak, training_flops_per_token
from sickbay.reference.evaluation.guesses import Guesses, Shown, guesses, shown
from sickbay.reference.evaluation.outlook import outlook
from sickbay.reference.generation.decoding import Decoding
from sickbay.reference.generation.generate import generate
from sickbay.reference.models.encoder_decoder import EncoderDecoder
from sickbay.reference.models.kinds import Model
from sickbay.reference.models.model import Transformer
from sickbay.reference.text.tokenizer import Tokenizer

SAMPLE_BYTES = 500
TRAIN_ROWS = 240  # windows of the training part on which the finished model is evaluated, for the gap


@dataclass(frozen=True)
class Training:
    """What a finished training did. `tokens_per_second`: of its steps alone; `history`: (step, validation loss) under way, in order.

    `rate`: the last learning rate over the highest.
    """

    title: str
    steps: int
    tokens_per_step: float
    seconds: float
    tokens_per_second: float
    history: Sequence[tuple[int, float]]
    ways_on: Sequence[tuple[str, str]] = ()
    rate: float = 1.0


def close(training: Training, model: Model, task: Task, evaluated: Evaluation | None = None) -> Closing:
    """The card of `training` by `task`, which left `model`. `evaluated`: the loss on all of the validation part, if already known.

    torch's random state is as it was.
    """
    config, corpus, device = model.config, task.corpus, next(model.parameters()).device

    def judged(part: Part, most_rows: int | None = None) -> Evaluation:
        return evaluate(model, on(device, task.spread(part, most_rows)), config.pad_id)

    random = torch.get_rng_state()
    try:
        evaluated = evaluated or judged("val")
        if isinstance(model, EncoderDecoder):
            flops = peak = math.nan  # its two sides do not read the same tokens
        else:
            flops, peak = training.tokens_per_second * training_flops_per_token(model, config), measured_peak(str(device))
        sample: Sample | Shown
        compared: Baselines | Guesses
        if isinstance(task.objective, NextToken):
            assert isinstance(model, Transformer)
            sample = write_sample(model, corpus.tokenizer, corpus.train, corpus.bytes_per_token)
            compared = baselines(corpus.train, corpus.val, corpus.tokenizer.vocab_size)
        else:
            sample, compared = shown(task, model, device), guesses(task, model, device)
    finally:
        torch.set_rng_state(random)
    return Closing(
        title=training.title,
        parameters=sum(weight.numel() for weight in model.parameters()),
        steps=training.steps,
        tokens_per_step=training.tokens_per_step,
        seconds=training.seconds,
        tokens_per_second=training.tokens_per_second,
        flops_per_second=flops,
        peak_flops=peak,
        validation=evaluated,
        bytes_per_token=task.bytes_per_token,
        baselines=compared,
        sample=sample,
        outlook=outlook(training.history, judged("train", TRAIN_ROWS), evaluated, training.rate),
        ways_on=training.ways_on,
        asked=task.asked,
    )


def write_sample(model: Transformer, tokenizer: Tokenizer, train: Tokens, bytes_per_token: float) -> Sample:
    """About 500 bytes written by `model` after the end of a document, or a line end, or the corpus's first token."""
    if tokenizer.end_of_text is not None:
        start, prompt = tokenizer.end_of_text, ""
    else:
        try:
            start = int(tokenizer.encode("\n")[-1])
        except (ValueError, IndexError):
            start = int(train[0])
        prompt = tokenizer.decode([start])
    count = max(24, round(SAMPLE_BYTES / bytes_per_token))
    ids = torch.tensor([[start]], device=model.token_embedding.weight.device)
    written = torch.cat(list(generate(model, ids, count, Decoding(), vocab_size=tokenizer.vocab_size))).cpu()
    return Sample(prompt, tokenizer.decode(written), manner([written.numpy()], train))
