"""What an encoder-decoder writes to a source: a translation, or what stood in the holes of a text."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace

import torch

from sickbay.reference.data.objectives import Ids, SpanCorruption
from sickbay.reference.data.pairs import Translation
from sickbay.reference.data.tasks import objective_of
from sickbay.reference.generation.beam import GREEDY, Beams
from sickbay.reference.generation.complete import Completion, Piece, Writer, search, write
from sickbay.reference.generation.decoding import Decoding
from sickbay.reference.models.encoder_decoder import EncoderDecoder, Given
from sickbay.reference.saving.checkpoint import State
from sickbay.reference.settings.recipe import Recipe
from sickbay.reference.text.marked import Marked
from sickbay.reference.text.tokenizer import Tokenizer

SENTINEL = "<{}>"


class Answerer(Writer):
    """A Writer of targets: `model` and how its sources and targets are written.

    A hole in a source is <0>, the next <1>; its target says what stood in them.
    """

    goes_on = False

    def __init__(self, model: EncoderDecoder, tokenizer: Tokenizer, objective: SpanCorruption | Translation) -> None:
        self.model, self._tokenizer, self._objective = model, tokenizer, objective

    def given(self, source: str | Ids) -> tuple[Given, Marked]:
        """(the model of what is written to `source`, its tokenizer). Raises ValueError where `source` is none."""
        objective, context = self._objective, self.model.config.context
        ids = Marked(self._tokenizer, marks(objective)).read(source) if isinstance(source, str) else source
        if not 0 < len(ids) <= context:
            raise ValueError(f"the source has {len(ids)} tokens; this model reads from 1 to {context}")
        end, never = self._ending(ids)
        device = self.model.encoder.token_embedding.weight.device
        model = self.model.given(torch.from_numpy(ids)[None].to(device), never)
        return model, Marked(self._tokenizer, marks(objective), objective.begin_id, end)

    def write(self, sources: Sequence[str], count: int, decoding: Decoding, seed: int = 0, stop: Sequence[str] = ()) -> Iterator[Piece]:
        """Yields what is written to each source, one after another, as `complete.write` does; number r with `seed` + r."""
        for row, source in enumerate(sources):
            model, words = self.given(source)
            for piece in write(model, words, [""], min(count, model.config.context), decoding, seed + row, stop):
                yield piece._replace(row=row)

    def search(self, sources: Sequence[str], count: int, beams: Beams, decoding: Decoding = GREEDY) -> list[list[Completion]]:
        """What beam search finds for each source, the best first."""
        found = []
        for source in sources:
            model, words = self.given(source)
            (texts,) = search(model, words, [""], min(count, model.config.context), beams, decoding)
            found.append([replace(text, prompt=source) for text in texts])
        return found

    def _ending(self, source: Ids) -> tuple[int, tuple[int, ...]]:
        """(the id after which nothing is written, ids that are never written)."""
        objective = self._objective
        if isinstance(objective, Translation):
            return objective.end_id, (objective.pad_id, objective.begin_id)
        found, most = source[source > objective.begin_id].tolist(), objective.sentinels - 1
        holes = len(found)
        if not 0 < holes <= most or found != [objective.sentinel(hole) for hole in range(holes)]:
            said = f"it has {holes}" if not 0 < holes <= most else "they are out of order"
            raise ValueError(f"a source has 1 to {most} holes, written <0>, <1> and so on, as in 'To be<0>not to be'; {said}")
        return objective.sentinel(holes), (objective.begin_id,)


def marks(objective: SpanCorruption | Translation) -> list[str]:
    """How the ids after the tokenizer's are written."""
    if isinstance(objective, Translation):
        return [""] * objective.extra_ids
    return ["", *(SENTINEL.format(number) for number in range(objective.sentinels))]


def answerer(state: State, model: EncoderDecoder) -> Answerer:
    """Of the checkpoint `state`, whose model is `model`. Raises ValueError where its recipe trains no such model."""
    recipe = Recipe(**state.recipe)
    objective = objective_of(recipe, state.config, state.tokenizer)
    if not isinstance(objective, (SpanCorruption, Translation)):
        raise ValueError(f"the model in {state.folder} is an encoder-decoder, which objective={recipe.objective} does not train")
    return Answerer(model, state.tokenizer, objective)
