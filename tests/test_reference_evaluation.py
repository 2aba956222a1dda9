"""Losses over a whole text, tables of counts beside them, whether to train longer, and the card that tells it."""

from __future__ import annotations

import dataclasses
import io
import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn import functional

from sickbay.reference.data.batches import spread_batches
from sickbay.reference.data.corpus import Corpus
from sickbay.reference.data.tasks import task_of
from sickbay.reference.evaluation import card, closing
from sickbay.reference.evaluation.evaluation import Baselines, Evaluation, Manner, baselines, evaluate, manner, pieces
from sickbay.reference.evaluation.flops import training_flops_per_token
from sickbay.reference.evaluation.outlook import line, outlook
from sickbay.reference.models.config import Config
from sickbay.reference.models.model import Transformer
from sickbay.reference.settings.recipe import Recipe
from sickbay.reference.text.tokenizer import CharTokenizer


class Table(nn.Module):
    """Logits that depend on the token alone: its row of a table."""

    def __init__(self, logits_VV: Tensor) -> None:
        super().__init__()
        self.logits_VV = logits_VV

    def forward(self, ids_BT: Tensor) -> Tensor:
        return self.logits_VV[ids_BT]


def test_the_loss_is_the_mean_over_tokens_whatever_the_batches() -> None:
    logits_VV = torch.randn(5, 5, generator=torch.Generator().manual_seed(0))
    tokens = np.random.default_rng(0).integers(0, 5, 101)
    ids = torch.from_numpy(tokens)
    expected = functional.cross_entropy(logits_VV[ids[:-1]], ids[1:]).item()
    for context, batch_size in ((100, 1), (7, 3), (64, 12)):
        found = evaluate(Table(logits_VV), spread_batches(tokens, context, batch_size))
        assert found.tokens == 100
        assert found.loss == pytest.approx(expected, abs=1e-6)
        assert found.perplexity == pytest.approx(math.exp(expected), rel=1e-5)
    # Two bytes a token: half the bits a byte.
    assert found.bits_per_byte(2.0) == pytest.approx(expected / math.log(2) / 2, abs=1e-6)


def test_padding_and_ignored_targets_do_not_count_and_the_mode_is_kept() -> None:
    model = Table(torch.zeros(4, 4)).train()
    batch = (torch.zeros(2, 3, dtype=torch.int64), torch.tensor([[1, -100, 0], [2, 0, 0]]))
    found = evaluate(model, [batch], pad_id=0)
    assert found.tokens == 2
    assert found.loss == pytest.approx(math.log(4))
    assert model.training
    empty = evaluate(model.eval(), [(batch[0], torch.full((2, 3), -100))])
    assert empty.tokens == 0
    assert math.isnan(empty.loss)
    assert not model.training


def test_the_standard_error_is_that_of_the_rows() -> None:
    logits_VV = torch.randn(6, 6, generator=torch.Generator().manual_seed(1))
    tokens = np.random.default_rng(1).integers(0, 6, 10_001)
    found = evaluate(Table(logits_VV), spread_batches(tokens, 10, 50))
    ids = torch.from_numpy(tokens)
    rows = functional.cross_entropy(logits_VV[ids[:-1]], ids[1:], reduction="none").view(-1, 10).mean(1)
    assert found.error == pytest.approx(float(rows.std()) / math.sqrt(1000), rel=1e-4)


def test_baselines_stand_in_their_order_and_near_what_drew_the_text() -> None:
    # A chain whose next token depends on the last one only: two even choices out of eight.
    random, tokens = np.random.default_rng(0), [0]
    for bit in random.integers(0, 2, 40_000).tolist():
        tokens.append((2 * tokens[-1] + bit) % 8)
    text = np.array(tokens, dtype=np.uint16)
    found = baselines(text[:36_000], text[36_000:], 8)
    assert found.uniform == math.log(8)
    assert found.unigram == pytest.approx(math.log(8), abs=0.01)
    assert found.bigram == pytest.approx(math.log(2), abs=0.02)
    assert found.trigram == pytest.approx(math.log(2), abs=0.02)
    assert found.counted == 36_000


@given(st.integers(1, 60), st.integers(1, 80))
def test_pieces_cover_the_text_or_its_share_with_their_context(count: int, most: int) -> None:
    tokens = np.arange(count)
    covered: list[int] = []
    for before, piece in pieces(tokens, most):
        assert piece.tolist() == list(range(int(piece[0]), int(piece[-1]) + 1))
        assert before == min(2, int(piece[before]))
        covered += piece[before:].tolist()
    assert covered == sorted(set(covered))
    assert len(covered) == count if count <= most else len(covered) <= most


def test_a_loop_is_told_from_the_text_it_came_from() -> None:
    corpus = np.random.default_rng(0).integers(0, 20, 20_000)
    assert manner([corpus[300:700]], corpus).repeats == pytest.approx(0, abs=0.1)
    looped = manner([np.tile(corpus[:7], 50)], corpus)
    assert looped.repeats == 1.0
    assert looped.loop == (350, 7)
    assert looped.distinct == (len(set(corpus[:7].tolist())) / 350, 7 / 349, 7 / 348)


def test_arithmetic_of_a_step_is_what_torch_counts() -> None:
    from torch.utils.flop_counter import FlopCounterMode

    config = Config(dim=32, num_layers=2, num_heads=2, context=16, vocab_size=65)
    model = Transformer(config)
    ids = torch.zeros(3, 16, dtype=torch.int64)
    with FlopCounterMode(display=False) as counter:
        logits = model(ids)
        loss = logits.sum()
        loss.backward()
    linear = counter.get_total_flops()
    # The attention's own products are not in the counter on every device: the formula lies between with and without them.
    attention = 12 * config.num_layers * config.context * config.dim * ids.numel()
    formula = training_flops_per_token(model, config) * ids.numel()
    assert formula - attention <= linear * 1.001
    assert linear <= formula * 1.2


TRAIN, VALIDATION = Evaluation(1.5, 0.01, 15_000), Evaluation(1.6, 0.005, 100_000)


def test_the_line_through_points_on_a_line_is_that_line() -> None:
    slope, error = line([(step, 2.0 - 0.3 * step / 1000) for step in (100, 250, 400, 900)])
    assert slope == pytest.approx(-0.3)
    assert error == pytest.approx(0, abs=1e-9)


@pytest.mark.parametrize(
    ("losses", "verdict", "said"),
    [
        ([3.0, 2.5, 2.2, 2.0, 1.9, 1.82, 1.75, 1.69], "helps", "still falls, -0.7"),
        ([3.0, 2.0, 1.7, 1.6002, 1.6001, 1.6, 1.6001, 1.6], "little", "hardly moves"),
        ([3.0, 2.0, 1.5, 1.45, 1.5, 1.56, 1.61, 1.67], "overfits", "lowest at step 400 (1.4500)"),
        ([3.0, 2.0, 1.7, 1.6, 1.9, 1.4, 1.8, 1.5], "not known", "scatters too much"),
        ([3.0, 2.0, 1.7], "not known", "3 evaluations under way, 4 are needed"),
        ([], "not known", "0 evaluations under way"),
    ],
)
def test_whether_to_train_longer(losses: list[float], verdict: str, said: str) -> None:
    found = outlook([(100 * (number + 1), loss) for number, loss in enumerate(losses)], TRAIN, VALIDATION)
    assert found.verdict == verdict
    assert said in found.reason
    assert found.gap == pytest.approx(0.1)


@pytest.mark.parametrize(
    ("losses", "rate", "verdict", "said"),
    [
        ([3.0, 2.5, 2.2, 2.0, 1.9, 1.82, 1.75, 1.69], 0.1, "schedule over", "still falls, -0.7"),
        ([3.0, 2.5, 2.2, 2.0, 1.9, 1.82, 1.75, 1.69], 0.6, "helps", "still falls, -0.7"),
        ([3.0, 2.0, 1.7, 1.6002, 1.6001, 1.6, 1.6001, 1.6], 0.0, "schedule over", "down to 0% of its highest, where no step moves much"),
        ([3.0, 2.0, 1.5, 1.45, 1.5, 1.56, 1.61, 1.67], 0.1, "overfits", "lowest at step 400 (1.4500)"),
        ([3.0, 2.0, 1.7, 1.6, 1.9, 1.4, 1.8, 1.5], 0.1, "not known", "scatters too much"),
        ([3.0, 2.0, 1.7], 0.1, "not known", "3 evaluations under way, 4 are needed"),
    ],
)
def test_a_schedule_that_is_over_tells_nothing_of_more_steps(losses: list[float], rate: float, verdict: str, said: str) -> None:
    found = outlook([(100 * (number + 1), loss) for number, loss in enumerate(losses)], TRAIN, VALIDATION, rate)
    assert (found.verdict, said in found.reason) == (verdict, True), found.reason
    assert card.plain(closed(outlook=found)).count("train longer?") == 1


def closed(**changes: object) -> card.Closing:
    sample = card.Sample("\n", "ROMEO:\x1b[2J\nWhat now?\n" * 30, Manner((0.1, 0.3, 0.5), (0.1, 0.4, 0.6), 0.02, (0, 0)))
    whole_card = card.Closing(
        "text.txt", 795_904, 2_000, 768, 131.0, 12_000.0, 60e9, 120e9, VALIDATION, 1.0,
        Baselines(4.17, 3.35, 2.49, 2.06, 1_000_000), sample,
        outlook([(100, 3.0)], TRAIN, VALIDATION), [("sickbay generate run", "more of it")],
    )  # fmt: skip
    return dataclasses.replace(whole_card, **changes)  # type: ignore[arg-type]


def test_the_card_says_where_the_loss_stands_in_at_most_thirty_plain_lines() -> None:
    said = card.plain(closed())
    rows = said.splitlines()
    assert len(rows) <= 30
    assert max(map(len, rows)) <= card.PLAIN_WIDTH
    assert "\x1b" not in said
    assert "\\x1b[2J" in said
    names = [row.split()[0] for row in rows if "#" in row and "bits per byte" in row]
    assert names == ["uniform", "unigram", "bigram", "trigram", "this"]
    assert "1.6000 +- 0.0050 nats per token over 100,000, perplexity 4.95, 2.308 bits per byte" in said
    assert "0.460 below the trigram table" in said
    assert "50% of this machine's matrix product (120 GFLOP/s)" in said
    assert "train longer?  not known: 1 evaluation under way, 4 are needed" in said
    assert rows[-1] == "sickbay generate run   # more of it"


@pytest.mark.parametrize("loss", [math.nan, math.inf, 5.0, 3.0, 0.0])
@pytest.mark.parametrize("width", [1, 40, 200])
def test_the_card_stands_for_any_loss_and_width(loss: float, width: int) -> None:
    said = card.plain(closed(validation=Evaluation(loss, math.nan, 10), sample=None), width)
    assert "this model" in said
    assert len(said.splitlines()) <= 30


def test_the_card_is_plain_in_the_files_own_characters() -> None:
    raw = io.BytesIO()
    file = io.TextIOWrapper(raw, encoding="ascii")
    card.show(closed(title="ä.txt", sample=None), file)
    file.flush()
    assert b"\\xe4.txt" in raw.getvalue()


def test_a_finished_model_is_examined_without_moving_the_random_state() -> None:
    text = "the quick brown fox jumps over the lazy dog\n" * 40
    tokenizer = CharTokenizer("".join(sorted(set(text))))
    tokens = tokenizer.encode(text)
    torch.manual_seed(0)
    model = Transformer(Config(dim=16, num_layers=1, num_heads=2, context=16, vocab_size=tokenizer.vocab_size, dropout=0.1))
    before = torch.get_rng_state()
    training = closing.Training("fox.txt", 0, 64, 0.0, 1000.0, [])
    corpus = Corpus(tokenizer, tokens[:1500], tokens[1500:], "", 1.0, several=False)
    found = closing.close(training, model, task_of(corpus, model.config, Recipe(batch_size=4)))
    assert torch.equal(torch.get_rng_state(), before)
    assert model.training
    assert found.validation.tokens == len(tokens) - 1501
    assert found.validation.loss == pytest.approx(math.log(tokenizer.vocab_size), abs=0.1)
    assert isinstance(found.baselines, Baselines) and found.baselines.trigram < 0.5
    assert isinstance(found.sample, card.Sample)
    assert found.sample.prompt == "\n"
    assert len(found.sample.text) == closing.SAMPLE_BYTES
    assert found.flops_per_second == 1000.0 * training_flops_per_token(model, model.config)
    assert "no better than an even guess" in card.plain(found) or "below an even guess" in card.plain(found)
