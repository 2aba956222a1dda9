"""Generated sequences are recognised whatever loop makes them; what is said of them holds against numbers known by hand."""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from charts import chart
from torch import Tensor, nn
from verdicts import ask, found, read, unexamined

import sickbay
from sickbay.core.diagnosis import Diagnosis
from sickbay.core.repetition import distinct_share, longest_loop, repeated_shares, repetition
from sickbay.exams.generation_path import Form
from sickbay.patient import ForwardCall
from sickbay.probes.generation import without_padding
from sickbay.probes.tracks import Sampling, Track


# --- repetition -------------------------------------------------------------------------------------------------------
def test_repeated_shares_are_those_counted_by_hand() -> None:
    assert repeated_shares([1, 2, 1, 2, 1], 5, 2).tolist() == [0.5]  # 12 21 12 21: two of four are distinct
    assert repeated_shares([1, 2, 3, 4, 5], 5, 2).tolist() == [0.0]
    assert repeated_shares([7, 7, 7], 4, 2).size == 0


def test_longest_loop_gives_its_length_and_period() -> None:
    assert longest_loop([9, 1, 2, 3, 1, 2, 3, 1, 2, 8]) == (8, 3)
    assert longest_loop([5, 5, 5, 5]) == (4, 1)
    assert longest_loop([1, 2, 3, 4]) == (0, 0)
    assert longest_loop([]) == (0, 0)


def test_distinct_share_counts_no_gram_across_two_rows() -> None:
    assert distinct_share([[1, 2], [2, 1]], 2) == 1.0
    assert distinct_share([[1, 1, 1]], 2) == 0.5


def test_a_text_that_repeats_itself_excuses_what_repeats_itself() -> None:
    random = np.random.default_rng(0)
    varied, loop = random.integers(0, 50, 2000), np.tile([3, 4], 30)
    against_varied = repetition([loop], varied)
    against_itself = repetition([loop], np.tile([3, 4], 500))
    drawn_alike = repetition([random.integers(0, 50, 200)], varied)
    assert against_varied is not None and against_varied.share == 1.0
    assert against_itself is not None and against_itself.share == 0.0
    assert drawn_alike is not None and drawn_alike.share < 0.1
    assert repetition([loop[:10]], varied) is None
    assert repetition([loop], varied[:20]) is None


def test_padding_is_no_text_but_a_row_of_one_token_is() -> None:
    kept, filler = without_padding(np.array([4, 5, 6, 0, 0, 0]))
    assert (kept.tolist(), filler) == ([4, 5, 6], 0)
    assert without_padding(np.array([7, 7, 7]))[0].tolist() == [7, 7, 7]
    assert without_padding(np.array([4, 5, -100, -100]))[0].tolist() == [4, 5]


# --- one sequence -----------------------------------------------------------------------------------------------------
def followed(*calls: Any) -> Track:
    holder = nn.Linear(1, 1)
    first, *rest = (torch.tensor(call) for call in calls)
    track = Track.of(holder, "ids", first, 3, "train.py:7", False)
    for ids in rest:
        assert track.grows(ids), ids
    return track


@pytest.mark.parametrize(
    ("kind", "calls"),
    [
        ("whole", ([[4, 5]], [[4, 5, 6]], [[4, 5, 6, 7]], [[4, 5, 6, 7, 9]])),
        ("window", ([[4, 5]], [[5, 6]], [[6, 7]], [[7, 9]])),
        ("cached", ([[4, 5]], [[6]], [[7]], [[9]])),
        ("buffer", ([[4, 5, 0, 0, 0]], [[4, 5, 6, 0, 0]], [[4, 5, 6, 7, 0]], [[4, 5, 6, 7, 9]])),
        ("whole", ([4, 5], [4, 5, 6], [4, 5, 6, 7], [4, 5, 6, 7, 9])),
        ("whole", ([[4], [5]], [[4], [5], [6]], [[4], [5], [6], [7]], [[4], [5], [6], [7], [9]])),
    ],
)
def test_every_way_to_bring_the_new_token_back_gives_the_same_sequence(kind: str, calls: Any) -> None:
    track = followed(*calls)
    assert track.kind == kind
    assert track.history().tolist() == [[4, 5, 6, 7, 9]]


@pytest.mark.parametrize(
    ("first", "second"),
    [([[4, 5, 6]], [[4, 5, 6]]), ([[4, 5, 6]], [[7, 8, 9]]), ([[4, 5]], [[4, 6, 7]]), ([[4, 5]], [[4, 5, 6, 7]]), ([[1], [2]], [[1, 2]])],
)
def test_other_batches_are_no_growth(first: Any, second: Any) -> None:
    assert not Track.of(nn.Linear(1, 1), "ids", torch.tensor(first), 0, "", False).grows(torch.tensor(second))


@pytest.mark.parametrize("temperature", [0.5, 1.0, 3.0])
def test_the_temperature_that_drew_the_tokens_is_found(temperature: float) -> None:
    random = torch.Generator().manual_seed(0)
    sampling = Sampling()
    for _ in range(60):
        logits = 2 * torch.randn(20, 40, generator=random)
        chosen = torch.multinomial((logits / temperature).softmax(-1), 1, generator=random)[:, 0]
        sampling.add(logits.log_softmax(-1), chosen)
    outcome = sampling.outcome()
    assert outcome is not None
    assert outcome["temperature"] == temperature
    assert (outcome["surprise"] > outcome["entropy"] + 0.2) == (temperature > 1)


def test_first_choices_are_temperature_0() -> None:
    sampling = Sampling()
    for _ in range(10):
        logits = torch.randn(2, 9)
        sampling.add(logits.log_softmax(-1), logits.argmax(-1))
    outcome = sampling.outcome()
    assert outcome is not None and (outcome["temperature"], outcome["greedy"]) == (0.0, 1.0)


# --- whole runs -------------------------------------------------------------------------------------------------------
class Reader(nn.Module):
    """Attention by running means: a cache of sums; `shifted` makes the cached path forget how many tokens it holds."""

    def __init__(self, shifted: bool = False) -> None:
        super().__init__()
        self.embed, self.head, self.shifted = nn.Embedding(12, 16), nn.Linear(16, 12), shifted

    def forward(self, ids: Tensor, state: tuple[Tensor, int] | None = None) -> tuple[Tensor, tuple[Tensor, int]]:
        x = self.embed(ids)
        total, count = state if state is not None else (torch.zeros(len(ids), 1, 16), 0)
        sums = total + x.cumsum(1)
        counts = torch.arange(1, ids.shape[1] + 1)[:, None] + (0 if self.shifted else count)
        return self.head((sums / counts + x).tanh()), (sums[:, -1:], count + ids.shape[1])


def trained(folder: Path, model: nn.Module, generate: Any, steps: int = 20) -> Any:
    """The chart's readings and unobserved reasons after a short training that ends in `generate(model)`."""
    torch.manual_seed(0)
    optimizer = torch.optim.Adam(model.parameters(), 1e-2)
    with sickbay.watch(out=folder) as doctor:
        for _ in range(steps):
            ids = (torch.randint(12, (8, 1)) + torch.arange(17) * 5) % 12
            logits = model(ids[:, :-1])[0]
            loss = nn.functional.cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten())
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        with torch.no_grad():
            generate(model)
    assert not doctor.chart().facts.get("problems")
    return doctor.chart()


def step_by_step(model: nn.Module, count: int = 40) -> list[int]:
    said, token, state = [], torch.tensor([[3, 8]]), None
    for _ in range(count):
        logits, state = model(token, state)
        token = logits[:, -1:].argmax(-1)
        said.append(int(token))
    return said


class Translator(nn.Module):
    """A running mean of the target beside the mean of a source of the same length."""

    def __init__(self) -> None:
        super().__init__()
        self.source, self.target, self.head = nn.Embedding(12, 16), nn.Embedding(12, 16), nn.Linear(16, 12)

    def forward(self, src: Tensor, tgt: Tensor) -> Tensor:
        counts = torch.arange(1, tgt.shape[1] + 1)[:, None]
        return self.head((self.target(tgt).cumsum(1) / counts + self.source(src).mean(1, keepdim=True)).tanh())


def test_a_target_as_long_as_its_source_is_what_grows(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = Translator()
    optimizer = torch.optim.Adam(model.parameters(), 1e-2)
    with sickbay.watch(out=tmp_path / "run") as doctor:
        for _ in range(20):
            src = torch.randint(12, (8, 16))
            ids = torch.cat((torch.zeros(8, 1, dtype=torch.int64), src), 1)
            loss = nn.functional.cross_entropy(model(src, ids[:, :-1]).flatten(0, 1), ids[:, 1:].flatten())
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        with torch.no_grad():
            src, made = torch.randint(12, (3, 16)), torch.zeros(3, 1, dtype=torch.int64)
            for _ in range(16):
                made = torch.cat((made, model(src, made)[:, -1].argmax(-1, keepdim=True)), 1)
    assert doctor.chart()["generation_gap"][0].value < 1e-4


def test_a_cache_that_agrees_is_told_from_one_that_does_not(tmp_path: Path) -> None:
    right = trained(tmp_path / "right", Reader(), step_by_step)
    wrong = trained(tmp_path / "wrong", Reader(shifted=True), step_by_step)
    assert right["generation_gap"][0].value < 1e-4
    assert wrong["generation_gap"][0].value > 0.1
    assert wrong["generation_gap"][0].source.startswith(__file__)
    found("generation-path-mismatch", wrong, "critical")
    assert ask("generation-path-mismatch", right) is None


def test_what_is_written_of_a_sample_is_what_was_generated(tmp_path: Path) -> None:
    said: list[int] = []
    record = trained(tmp_path / "run", Reader(), lambda model: said.extend(step_by_step(model)))
    reading = record["generated_repetition"][-1]
    assert reading.note["tokens"] == len(said) - 1  # the last one is never fed back
    assert reading.note["distinct_1"] == pytest.approx(distinct_share([said[:-1]], 1), abs=1e-3)
    assert reading.note["greedy"] == 1.0
    assert (reading.note["loop"], reading.note["period"]) == longest_loop(said[:-1])


def test_evaluation_over_other_batches_is_no_generated_text(tmp_path: Path) -> None:
    def evaluate(model: nn.Module) -> None:
        for start in range(60):  # windows that slide by one, as a perplexity over a long text takes them
            ids = ((torch.arange(start, start + 9) * 5) % 12)[None]
            logits = model(ids[:, :-1])[0]
            nn.functional.cross_entropy(logits[0], ids[0, 1:])
        for width in itertools.chain(range(3, 9), range(3, 9)):
            model(torch.randint(12, (4, width)))

    record = trained(tmp_path / "run", Reader(), evaluate)
    assert not record["generated_repetition"] and not record["generation_gap"]
    assert "24 tokens" in unexamined("repetitive-generation", record)


# --- verdicts ---------------------------------------------------------------------------------------------------------
def sample(share: float, step: int = 99, **note: Any) -> Any:
    return read("generated_repetition", share, step, **{"loop": 12, "period": 3, "greedy": 1.0, **note})


LEARNED: dict[str, Any] = {"loss": [4.0] + [1.5] * 99, "chance_loss": [4.1]}


def test_loops_at_the_end_of_training_are_found_and_the_cure_fits_the_decoding() -> None:
    greedy = found("repetitive-generation", chart(generated_repetition=[sample(0.9)], **LEARNED), "warning")
    drawn = found("repetitive-generation", chart(generated_repetition=[sample(0.9, greedy=0.4)], **LEARNED), "warning")
    assert greedy.prescribes == "sample-with-temperature" and "greedy" in greedy.summary
    assert drawn.prescribes == "penalise-repetition"
    assert ask("repetitive-generation", chart(generated_repetition=[sample(0.3)], **LEARNED)) is None


def test_loops_of_a_sample_that_training_goes_on_after_are_a_note() -> None:
    found("repetitive-generation", chart(generated_repetition=[sample(0.9, 60), sample(0.9, 90)], **LEARNED), "note")
    found("repetitive-generation", chart(generated_repetition=[sample(0.9, 60), sample(0.9, 98)], **LEARNED), "warning")


def test_early_samples_and_models_that_learned_nothing_are_not_judged() -> None:
    assert "first half" in unexamined("repetitive-generation", chart(generated_repetition=[sample(0.9, 10)], **LEARNED))
    flat: dict[str, Any] = {"loss": [4.1] * 100, "chance_loss": [4.1]}
    assert "hardly learned" in unexamined("repetitive-generation", chart(generated_repetition=[sample(0.9)], **flat))
    lost: dict[str, Any] = {"loss": [4.0] * 20 + [float("nan")] * 80, "chance_loss": [4.1]}
    assert "not finite" in unexamined("repetitive-generation", chart(generated_repetition=[sample(0.9)], **lost))


def written(cost: float, temperature: float, surprise: float, entropy: float, lead: float = 50.0) -> dict[str, Any]:
    note: dict[str, Any] = {"surprise": surprise, "entropy": entropy, "lead": lead, "usual": 1.6}
    return {
        "generated_cross_entropy": [read("generated_cross_entropy", cost, 100, **note)],
        "sampling_temperature": [read("sampling_temperature", temperature, 100, **note)],
        **LEARNED,
    }


def test_hot_and_foreign_texts_are_found_and_usual_ones_are_not() -> None:
    hot = found("incoherent-generation", chart(**written(4.0, 4.0, 4.5, 1.5)), "warning")
    foreign = found("incoherent-generation", chart(**written(4.0, 1.0, 4.0, 3.9, 0.0)), "warning")
    assert "temperature 4" in hot.summary and foreign.certainty == "likely"
    for healthy in (
        written(1.9, 1.1, 1.8, 1.7, 1.0),
        written(2.3, 1.25, 2.3, 1.9, 9.0),
        written(1.7, 4.0, 4.5, 1.5),
        written(2.6, 1.0, 2.3, 2.3, 0),
    ):
        assert not isinstance(ask("incoherent-generation", chart(**healthy)), Diagnosis)


def test_a_gap_within_half_precision_is_none() -> None:
    def gap(value: float, half: bool, kl: float = 0.01) -> Any:
        return chart(generation_gap=[read("generation_gap", value, kind="cached", tokens=6, kl=kl, half=half)])

    assert ask("generation-path-mismatch", gap(0.1, True)) is None
    assert ask("generation-path-mismatch", gap(0.001, False)) is None
    assert "cache" in found("generation-path-mismatch", gap(0.1, False), "critical").summary
    found("generation-path-mismatch", gap(0.1, False, kl=1e-5), "warning")  # another function, but no other text
    assert "finite" in unexamined("generation-path-mismatch", gap(float("nan"), False))


class Masking(nn.Module):
    def forward(self, ids: Tensor, mask: Tensor) -> Tensor:
        raise NotImplementedError


@pytest.mark.parametrize("rows", [3, 40])
@pytest.mark.parametrize("time_first", [False, True])
def test_the_training_form_of_a_generated_row_masks_none_of_it(rows: int, time_first: bool) -> None:
    """However many rows training has beside its 12 positions, and whatever padding these had."""
    ids = torch.randint(50, 90, (12, rows) if time_first else (rows, 12))
    mask = torch.ones(rows, 12, dtype=torch.long)
    mask[0, 4:] = 0
    form = Form.of(ForwardCall(Masking(), (ids, mask), {}, True, True, torch.get_rng_state(), "", finished=True))
    assert form is not None
    made = torch.randint(50, 90, (9, 1) if time_first else (1, 9))
    filled = form.fill("ids", made, {}, time_first)
    assert filled["ids"] is made and torch.equal(filled["mask"], torch.ones(1, 9, dtype=torch.long))
    with pytest.raises(LookupError, match="longer than the 12"):
        form.fill("ids", torch.randint(50, 90, (13, 1) if time_first else (1, 13)), {}, time_first)


def test_as_many_rows_as_positions_leave_a_mask_unexplained() -> None:
    ids, mask = torch.randint(50, 90, (12, 12)), torch.ones(12, 12).tril()
    form = Form.of(ForwardCall(Masking(), (ids, mask), {}, True, True, torch.get_rng_state(), "", finished=True))
    assert form is not None
    with pytest.raises(LookupError, match="as many rows as positions"):
        form.fill("ids", ids[:1, :9], {}, False)
