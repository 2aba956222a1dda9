"""What is examined once a training has ended: the numbers of its card."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from sickbay.reference.data.batches import Tokens, spread_batches
from sickbay.reference.evaluation.card import Closing, Sample
from sickbay.reference.evaluation.evaluation import Evaluation, baselines, evaluate, manner
from sickbay.reference.evaluation.flops import measured_peak, training_flops_per_token
from sickbay.reference.evaluation.outlook import outlook
from sickbay.reference.generation.decoding import Decoding
from sickbay.reference.generation.generate import generate
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
    tokens_per_step: int
    seconds: float
    tokens_per_second: float
    history: Sequence[tuple[int, float]]
    ways_on: Sequence[tuple[str, str]] = ()
    rate: float = 1.0


def close(
    training: Training,
    model: Transformer,
    tokenizer: Tokenizer,
    train: Tokens,
    validation: Tokens,
    bytes_per_token: float,
    batch_size: int,
    *,
    end_of_text: int | None = None,
    evaluated: Evaluation | None = None,
) -> Closing:
    """The card of `training`, which left `model`. `train`, `validation`: `(N,)` ids.

    `end_of_text`: the id that ends the documents packed in a row. `evaluated`: the loss on all of `validation`, if already known.
    torch's random state is as it was. Raises ValueError where the tokens fill no window.
    """
    config, device = model.config, model.token_embedding.weight.device

    def judged(tokens: Tokens, most_rows: int | None = None) -> Evaluation:
        rows = spread_batches(tokens, config.context, batch_size, most_rows, end_of_text=end_of_text)
        return evaluate(model, ((ids.to(device), targets.to(device)) for ids, targets in rows), config.pad_id, end_of_text)

    random = torch.get_rng_state()
    try:
        if evaluated is None:
            evaluated = judged(validation)
        peak = measured_peak(str(device))
        sample = write_sample(model, tokenizer, train, bytes_per_token)
    finally:
        torch.set_rng_state(random)
    return Closing(
        title=training.title,
        parameters=sum(weight.numel() for weight in model.parameters()),
        steps=training.steps,
        tokens_per_step=training.tokens_per_step,
        seconds=training.seconds,
        tokens_per_second=training.tokens_per_second,
        flops_per_second=training.tokens_per_second * training_flops_per_token(model, config),
        peak_flops=peak,
        validation=evaluated,
        bytes_per_token=bytes_per_token,
        baselines=baselines(train, validation, tokenizer.vocab_size),
        sample=sample,
        outlook=outlook(training.history, judged(train, TRAIN_ROWS), evaluated, training.rate),
        ways_on=training.ways_on,
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
