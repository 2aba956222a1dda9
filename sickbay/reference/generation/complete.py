"""From prompts to texts: what `sickbay generate` does."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple, Protocol

import torch
from torch import Tensor

from sickbay.reference.generation.beam import GREEDY, Beams, Hypothesis, beam_search
from sickbay.reference.generation.decoding import Decoding
from sickbay.reference.generation.generate import generate
from sickbay.reference.generation.stream import TextStream
from sickbay.reference.models.model import LanguageModel
from sickbay.reference.text.tokenizer import Tokenizer

Ending = Literal["length", "stop", "end-of-text"]


class Piece(NamedTuple):
    """A piece of row `row`'s text; `ended` says why it is the last, `tokens` how many were chosen so far."""

    row: int
    text: str
    tokens: int
    ended: Ending | None


@dataclass(frozen=True)
class Completion:
    """What followed `prompt`, and why no more did: enough tokens, a stop string, or the end of the text by the model's own choice."""

    prompt: str
    text: str
    tokens: int
    ended: Ending
    seed: int


class Writer(Protocol):
    """What `sickbay generate` asks of a trained model. `goes_on`: what it writes belongs behind the prompt, and is no answer to it."""

    goes_on: bool

    def write(self, prompts: Sequence[str], count: int, decoding: Decoding, seed: int = 0, stop: Sequence[str] = ()) -> Iterator[Piece]:
        """Yields what is written to `prompts`, as the function `write` does."""
        ...

    def search(self, prompts: Sequence[str], count: int, beams: Beams, decoding: Decoding = GREEDY) -> list[list[Completion]]:
        """What beam search finds for each prompt, as the function `search` does."""
        ...


@dataclass(frozen=True)
class Continuer(Writer):
    """A Writer of text that goes on from its prompt."""

    model: LanguageModel
    tokenizer: Tokenizer

    goes_on = True

    def write(self, prompts: Sequence[str], count: int, decoding: Decoding, seed: int = 0, stop: Sequence[str] = ()) -> Iterator[Piece]:
        return write(self.model, self.tokenizer, prompts, count, decoding, seed, stop)

    def search(self, prompts: Sequence[str], count: int, beams: Beams, decoding: Decoding = GREEDY) -> list[list[Completion]]:
        return search(self.model, self.tokenizer, prompts, count, beams, decoding)


def write(
    model: LanguageModel,
    tokenizer: Tokenizer,
    prompts: Sequence[str],
    count: int,
    decoding: Decoding,
    seed: int = 0,
    stop: Sequence[str] = (),
) -> Iterator[Piece]:
    """Yields the texts that follow `prompts` piece by piece as they are written, at most `count` tokens each.

    Row r is what it would be alone with `seed` + r. No piece holds half a character or a part of a stop string. An empty prompt is the
    beginning of a text, for tokenizers that have an end of text. Raises ValueError.
    """
    ids = [encoded(tokenizer, prompt) for prompt in prompts]
    streams: dict[int, TextStream] = {row: TextStream(tokenizer, row_ids.tolist(), stop) for row, row_ids in enumerate(ids)}
    for tokens, chosen_B in enumerate(generate(model, ids, count, decoding, seed, tokenizer.vocab_size), start=1):
        for row, token in enumerate(chosen_B.tolist()):
            if row in streams:
                piece = _advance(row, streams[row], token, tokens, count, tokenizer.end_of_text)
                if piece.ended is not None:
                    del streams[row]
                if piece.text or piece.ended is not None:
                    yield piece
        if not streams:
            return


def complete(
    model: LanguageModel,
    tokenizer: Tokenizer,
    prompts: Sequence[str],
    count: int,
    decoding: Decoding,
    seed: int = 0,
    stop: Sequence[str] = (),
) -> list[Completion]:
    """What `write` yields, one completion a prompt. Raises ValueError."""
    return collect(prompts, write(model, tokenizer, prompts, count, decoding, seed, stop), seed)


def collect(prompts: Sequence[str], pieces: Iterable[Piece], seed: int = 0) -> list[Completion]:
    """The pieces of each prompt put together."""
    texts = [""] * len(prompts)
    last: dict[int, Piece] = {}
    for piece in pieces:
        texts[piece.row] += piece.text
        last[piece.row] = piece
    return [Completion(prompt, texts[row], last[row].tokens, last[row].ended or "length", seed + row) for row, prompt in enumerate(prompts)]


def encoded(tokenizer: Tokenizer, prompt: str) -> Tensor:
    """The prompt's ids `(T,)`, the end of a text before for an empty one. Raises ValueError where there is nothing to go on from."""
    ids = torch.from_numpy(tokenizer.encode(prompt))
    if len(ids) == 0:
        if tokenizer.end_of_text is None:
            raise ValueError(
                "the prompt is empty and this tokenizer has no end of text to begin after; give a prompt, for instance a line end"
            )
        return torch.tensor([tokenizer.end_of_text])
    return ids


def _advance(row: int, stream: TextStream, token: int, tokens: int, count: int, end_of_text: int | None) -> Piece:
    if token == end_of_text:
        return Piece(row, stream.finish(), tokens, "end-of-text")
    text = stream.add(token)
    if not stream.stopped and tokens == count:
        text += stream.finish()
        return Piece(row, text, tokens, "stop" if stream.stopped else "length")
    return Piece(row, text, tokens, "stop" if stream.stopped else None)


def search(
    model: LanguageModel, tokenizer: Tokenizer, prompts: Sequence[str], count: int, beams: Beams, decoding: Decoding = GREEDY
) -> list[list[Completion]]:
    """The texts that beam search finds for each prompt, the best first; nothing is drawn, so their seed is 0. Raises ValueError."""
    ids, end = [encoded(tokenizer, prompt) for prompt in prompts], tokenizer.end_of_text
    found = beam_search(model, ids, count, beams, end_of_text=end, decoding=decoding, vocab_size=tokenizer.vocab_size)
    return [
        [_found(tokenizer, prompt, row_ids, hypothesis) for hypothesis in hypotheses]
        for prompt, row_ids, hypotheses in zip(prompts, ids, found)
    ]


def _found(tokenizer: Tokenizer, prompt: str, prompt_ids: Tensor, hypothesis: Hypothesis) -> Completion:
    stream = TextStream(tokenizer, prompt_ids.tolist())
    text = "".join(stream.add(token) for token in hypothesis.ids[: -1 if hypothesis.ended else None]) + stream.finish()
    return Completion(prompt, text, len(hypothesis.ids), "end-of-text" if hypothesis.ended else "length", 0)
