"""Beam search finds what it promises: with enough beams the best text of all, with one the greedy one."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
from test_reference_generate import ids_of, transformer, written
from torch import Tensor

from sickbay.reference.generation.beam import Beams, beam_search
from sickbay.reference.generation.decoding import Decoding
from sickbay.reference.models.model import Transformer

END = 2


def exhaustive(model: Transformer, prompt: Tensor, count: int, penalty: float, vocabulary: int) -> list[tuple[float, list[int]]]:
    """Every text of `count` tokens, or shorter and ended, with its score; the best first."""
    scored = []
    for length in range(1, count + 1):
        for ids in itertools.product(range(vocabulary), repeat=length):
            if END in ids[:-1] or (length < count and ids[-1] != END):
                continue
            whole = torch.cat((prompt, torch.tensor(ids)))
            logits = model(whole[None])[0, len(prompt) - 1 : -1].double().log_softmax(dim=-1)
            total = logits.gather(1, torch.tensor(ids)[:, None]).sum().item()
            scored.append((total / length**penalty, list(ids)))
    return sorted(scored, reverse=True)


@pytest.mark.parametrize("penalty", [0.0, 0.7, 1.0, 2.0, -0.5])
def test_with_a_beam_for_every_text_the_best_texts_of_all_are_found(penalty: float) -> None:
    model = transformer(vocab_size=4)
    prompt = torch.tensor([1, 3])
    with torch.no_grad():
        best = exhaustive(model, prompt, 4, penalty, 4)
    found = beam_search(model, [prompt], 4, Beams(width=256, length_penalty=penalty), end_of_text=END)[0]
    assert len(found) == len(best)  # each text once
    for hypothesis, (score, ids) in zip(found[:20], best):
        assert hypothesis.score == pytest.approx(score, abs=1e-5)
        assert hypothesis.ids == ids
        assert hypothesis.ended == (ids[-1] == END)


@pytest.mark.parametrize("shape", [{}, {"num_kv_heads": 2, "positions": "learned"}])
def test_one_beam_is_greedy_also_past_the_context(shape: dict[str, Any]) -> None:
    model = transformer(**shape)
    prompt = ids_of(1, 6)[0]
    found = beam_search(model, [prompt], 30, Beams(width=1))[0]
    assert found[0].ids == written(model, [prompt], 30, Decoding(temperature=0))[0].tolist()


@pytest.mark.parametrize("early", [False, True])
def test_each_prompt_of_a_batch_finds_what_it_finds_alone(early: bool) -> None:
    model = transformer()
    prompts = [ids_of(1, length, seed=length)[0] for length in (3, 9, 1)]
    beams = Beams(width=3, early_stopping=early)
    together = beam_search(model, prompts, 20, beams, end_of_text=END)
    for prompt, found in zip(prompts, together):
        alone = beam_search(model, [prompt], 20, beams, end_of_text=END)[0]
        assert [hypothesis.ids for hypothesis in found] == [hypothesis.ids for hypothesis in alone]


def test_stopping_late_never_finds_less_and_stopping_early_ends_with_so_many_ended_texts() -> None:
    for seed in range(6):
        model = transformer(seed)
        prompt = ids_of(1, 3, seed=seed)[0]
        late = beam_search(model, [prompt], 15, Beams(width=3), end_of_text=END)[0]
        early = beam_search(model, [prompt], 15, Beams(width=3, early_stopping=True), end_of_text=END)[0]
        assert late[0].score >= early[0].score
        assert [hypothesis.score for hypothesis in late] == sorted((hypothesis.score for hypothesis in late), reverse=True)
        assert len({tuple(hypothesis.ids) for hypothesis in late}) == 3


def test_penalties_hold_in_a_search() -> None:
    model = transformer()
    found = beam_search(model, [ids_of(1, 3)[0]], 12, Beams(width=3), decoding=Decoding(temperature=0, no_repeat_ngram=2))[0]
    for hypothesis in found:
        pairs = list(itertools.pairwise(hypothesis.ids))
        assert len(pairs) == len(set(pairs))


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"width": 0}, ["width", "0", "at least 1"]),
        ({"length_penalty": float("nan")}, ["length_penalty", "nan"]),
        ({"early_stopping": "never"}, ["early_stopping", "True or False"]),
    ],
)
def test_impossible_settings_are_refused(change: dict[str, Any], words: list[str]) -> None:
    with pytest.raises(ValueError) as refusal:
        Beams(**change)
    assert all(word in str(refusal.value) for word in words), refusal.value
