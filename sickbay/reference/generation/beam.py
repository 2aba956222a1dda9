"""Beam search: the likeliest whole texts instead of the likeliest next token. Suffixes: B prompts, W beams each, V vocabulary."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from sickbay.reference.generation.decoding import Decoding, penalised
from sickbay.reference.generation.reader import Reader
from sickbay.reference.models.model import LanguageModel
from sickbay.reference.settings.demand import demand, is_count, is_number

GREEDY = Decoding(temperature=0)


@dataclass(frozen=True)
class Beams:
    """How many texts of a prompt are followed side by side, and how ended ones compare; raises ValueError naming field, value and range.

    A text's score is its log-probability divided by length ** `length_penalty` (Wu et al. 2016, eq. 14, without its constant): 0
    favours short texts, 1 compares the mean per token. `early_stopping`: a prompt is done when `width` texts have ended; otherwise when no
    text still open can beat them.
    """

    width: int = 4
    length_penalty: float = 1.0
    early_stopping: bool = False

    def __post_init__(self) -> None:
        demand("width", self.width, is_count(self.width), "an integer of at least 1")
        demand("length_penalty", self.length_penalty, is_number(self.length_penalty), "a finite number")
        demand("early_stopping", self.early_stopping, isinstance(self.early_stopping, bool), "True or False")

    def score(self, log_probability: float, length: int) -> float:
        return log_probability / float(length**self.length_penalty)


@dataclass(frozen=True)
class Hypothesis:
    """A text found: its ids after the prompt, the end of text last where it `ended`; score as `Beams` says."""

    ids: list[int]
    score: float
    ended: bool


class _Search:
    """What is known of one prompt."""

    def __init__(self, beams: Beams, count: int) -> None:
        self.beams, self.count = beams, count
        self.found: list[Hypothesis] = []
        self.done = False

    def add(self, ids: list[int], log_probability: float, ended: bool) -> None:
        self.found.append(Hypothesis(ids, self.beams.score(log_probability, len(ids)), ended))
        self.found.sort(key=lambda hypothesis: -hypothesis.score)
        del self.found[self.beams.width :]

    def settle(self, best_open: float, length: int) -> None:
        """Done, if the open text of log-probability `best_open` and `length` cannot get among those found any more."""
        if len(self.found) == self.beams.width:
            # Log-probabilities only fall: none of the lengths to come beats the better of the shortest and the longest.
            attainable = max(self.beams.score(best_open, length), self.beams.score(best_open, self.count))
            self.done = self.beams.early_stopping or attainable <= self.found[-1].score


@torch.inference_mode()
def beam_search(
    model: LanguageModel,
    prompts: Sequence[Tensor],
    count: int,
    beams: Beams,
    *,
    end_of_text: int | None = None,
    decoding: Decoding = GREEDY,
    vocab_size: int | None = None,
) -> list[list[Hypothesis]]:
    """The texts found for each of `prompts` `(T,)`, at most `beams.width`, the best first; each at most `count` tokens.

    Of `decoding` the penalties apply; nothing is drawn. The model is in evaluation mode meanwhile. Raises ValueError.
    """
    was_training = model.training
    model.eval()
    try:
        B, W = len(prompts), beams.width
        reader = Reader(model, prompts, count)
        begin = reader.written_BT.shape[1]
        rows = torch.arange(B, device=reader.device).repeat_interleave(W)
        logits_BWV = reader.start()[rows]
        reader.select(rows)
        # All beams of a prompt begin alike: but for one they are out of the running, or the same text would be followed W times.
        sums_BW = torch.full((B, W), -torch.inf, dtype=torch.float64, device=reader.device)
        sums_BW[:, 0] = 0.0
        searches = [_Search(beams, count) for _ in prompts]
        for length in range(1, count + 1):
            scores = penalised(logits_BWV[:, :vocab_size], reader.written_BT, decoding)
            totals = (sums_BW[:, :, None] + scores.view(B, W, -1)).flatten(1)
            # Each beam can end but once: among twice as many candidates there are enough that go on.
            best = totals.topk(min(2 * W, totals.shape[1]), dim=-1)
            going = [
                _advance(search, row, best.values[row].tolist(), best.indices[row].tolist(), scores.shape[-1], end_of_text, reader, begin)
                for row, search in enumerate(searches)
            ]
            sums_BW = torch.tensor([[total for total, _, _ in beam] for beam in going], dtype=torch.float64, device=reader.device)
            parents = [parent for beam in going for _, parent, _ in beam]
            if parents != list(range(B * W)):
                reader.select(torch.tensor(parents, device=reader.device))
            chosen = torch.tensor([token for beam in going for _, _, token in beam], device=reader.device)
            for row, search in enumerate(searches):
                search.settle(going[row][0][0], length + 1)
            if length == count or all(search.done for search in searches):
                _close(searches, going, chosen, reader, begin)
                break
            logits_BWV = reader.append(chosen)
        return [search.found for search in searches]
    finally:
        model.train(was_training)


Open = tuple[float, int, int]  # log-probability, row of the reader it goes on from, token


def _advance(
    search: _Search,
    prompt: int,
    totals: list[float],
    indices: list[int],
    vocabulary: int,
    end_of_text: int | None,
    reader: Reader,
    begin: int,
) -> list[Open]:
    """The `width` best that go on; those that end among the `width` best of all are found."""
    W = search.beams.width
    going: list[Open] = []
    for rank, (total, index) in enumerate(zip(totals, indices)):
        row, token = prompt * W + index // vocabulary, index % vocabulary
        if token != end_of_text:
            going.append((total, row, token))
        elif rank < W and total > -torch.inf and not search.done:
            search.add([*reader.written_BT[row, begin:].tolist(), token], total, ended=True)
    # A vocabulary of few tokens leaves fewer: the rest is out of the running.
    return (going + [(-torch.inf, prompt * W, 0)] * W)[:W]


def _close(searches: list[_Search], going: list[list[Open]], chosen: Tensor, reader: Reader, begin: int) -> None:
    """What is still open counts as it stands."""
    written = torch.cat((reader.written_BT[:, begin:], chosen[:, None]), dim=1).tolist()
    for prompt, search in enumerate(searches):
        for number, (total, _, _) in enumerate(going[prompt]):
            if not search.done and total > -torch.inf:
                search.add(written[prompt * search.beams.width + number], total, ended=False)
