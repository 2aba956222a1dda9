"""From a trained model to tokens, one after another. Suffixes: B rows, T positions, V vocabulary."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from sickbay.reference.generation.decoding import Decoding, next_token
from sickbay.reference.generation.reader import Reader
from sickbay.reference.models.model import LanguageModel


def generate(
    model: LanguageModel, prompts: Sequence[Tensor] | Tensor, count: int, decoding: Decoding, seed: int = 0, vocab_size: int | None = None
) -> Iterator[Tensor]:
    """Yields `count` times the next token `(B,)` int64 of every row.

    `prompts`: ids `(T,)` int64 a row, of any length from 1, or `(B, T)`. Row r draws with `seed` + r alone, so it is what it would be on
    its own with that seed. What a row sees of a text longer than the context: see Reader. `vocab_size`: ids from it on are never chosen
    (a model's vocabulary may be rounded up). The model is in evaluation mode until the iterator ends or is closed. Raises ValueError.
    """
    reader = Reader(model, list(prompts), count)
    uniform_TB = torch.stack([uniforms(seed + row, count) for row in range(len(prompts))], dim=1).to(reader.device)
    chosen_B: Tensor | None = None
    was_training = model.training
    model.eval()
    try:
        for uniform_B in uniform_TB:
            # Not around the yield: what the caller does between two tokens is not ours to change.
            with torch.inference_mode():
                logits_BV = reader.start() if chosen_B is None else reader.append(chosen_B)
                chosen_B = next_token(logits_BV[:, :vocab_size], reader.written_BT, decoding, uniform_B)
            yield chosen_B.clone()
    finally:
        model.train(was_training)


@torch.no_grad()
def generate_plainly(model: LanguageModel, prompt_T: Tensor, count: int, decoding: Decoding, seed: int = 0) -> Tensor:
    """The `count` tokens that `generate` yields for one row, by the training's forward pass over all that is seen, for each token anew.

    Its work grows with the square of the length: it is what the cache is measured and tested against.
    """
    was_training, context = model.training, model.config.context
    model.eval()
    ids_T, first = prompt_T, max(0, len(prompt_T) - context)
    try:
        for uniform in uniforms(seed, count).to(prompt_T.device):
            if len(ids_T) - first > context:
                first = len(ids_T) - max(1, context // 2)
            logits_1V = model(ids_T[None, first:])[:, -1]
            ids_T = torch.cat((ids_T, next_token(logits_1V, ids_T[None], decoding, uniform[None])))
    finally:
        model.train(was_training)
    return ids_T[len(prompt_T) :]


def uniforms(seed: int, count: int) -> Tensor:
    """`count` numbers of [0, 1), float64, which `seed` alone decides, on the processor whatever the model runs on."""
    return torch.rand(count, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
