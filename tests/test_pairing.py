"""The pairing of inputs and targets, and the counting of tokens, against answers that are known by hand."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F

import sickbay
from sickbay.core.independence import dependence_z
from sickbay.core.reader import load_chart
from sickbay.core.record import RecordWriter
from sickbay.patient import LossCall, Patient
from sickbay.probes.corpus import Corpus, next_tokens
from sickbay.probes.examples import Examples
from sickbay.probes.loop import Loop
from sickbay.probes.pairing import gains, row_marks
from sickbay.reference.case import Case
from sickbay.reference.watched import watched


def call(name: str, logits: torch.Tensor, targets: torch.Tensor) -> LossCall:
    return LossCall(name, logits, targets, -100, "mean", getattr(F, name)(logits, targets), "train.py:1", True)


def test_a_perfect_answer_gains_what_the_wrong_one_costs() -> None:
    targets = torch.tensor([0, 1, 0, 1])
    logits = 4.0 * F.one_hot(targets, 2).float()
    gain, rolled = gains(call("cross_entropy", logits, targets), 4, 1)  # type: ignore[misc]
    assert gain == pytest.approx([4.0] * 4)
    assert rolled == pytest.approx([4.0 + math.log(1 + math.exp(-4.0))] * 4)


def test_an_answer_that_is_the_same_for_all_rows_gains_nothing_on_the_whole() -> None:
    logits = torch.tensor([[1.0, -1.0]]).expand(8, 2)
    gain, _ = gains(call("cross_entropy", logits, torch.tensor([0, 1, 1, 0, 1, 0, 0, 1])), 8, 1)  # type: ignore[misc]
    assert gain.sum() == pytest.approx(0.0, abs=1e-12)


def test_masked_targets_are_exchanged_among_themselves() -> None:
    targets = torch.full((4, 10), -100)
    for row, place in enumerate((1, 4, 6, 9)):
        targets[row, place] = row
    logits = 5.0 * F.one_hot(targets.clamp(0), 4).float().permute(0, 2, 1)
    gain, _ = gains(call("cross_entropy", logits, targets), 4, 10)  # type: ignore[misc]
    assert gain == pytest.approx([5.0] * 4)


def test_regression_gain_is_the_difference_of_squares() -> None:
    targets = torch.tensor([[0.0], [1.0], [0.0], [3.0]])
    gain, rolled = gains(call("mse_loss", targets.clone(), targets), 4, 1)  # type: ignore[misc]
    assert gain == pytest.approx([9.0, 1.0, 1.0, 9.0])
    assert rolled == pytest.approx(gain)


def test_binary_gain_is_the_logit() -> None:
    targets = torch.tensor([1.0, 0.0, 1.0, 0.0])
    gain, _ = gains(call("binary_cross_entropy_with_logits", 3.0 * (2 * targets - 1), targets), 4, 1)  # type: ignore[misc]
    assert gain == pytest.approx([3.0] * 4)


def test_scoring_again_is_no_loss_of_the_scripts() -> None:
    """What the probe computes itself must not come back to it through the watched functions."""
    seen = []
    targets = torch.tensor([[0.0], [1.0], [0.0], [3.0]])
    regression = call("mse_loss", targets.clone(), targets)
    with pytest.MonkeyPatch.context() as patch:
        for name in ("mse_loss", "cross_entropy", "l1_loss", "binary_cross_entropy_with_logits"):
            patch.setattr(F, name, lambda *_: seen.append(1))
        assert gains(regression, 4, 1) is not None
    assert not seen


def test_minus_zero_marks_a_row_as_zero_does() -> None:
    marks = row_marks([torch.tensor([[0.0, 0.0], [-0.0, 0.0]])], 2, 2)
    assert marks[0] == marks[1]


def test_places_in_the_batch_and_equal_targets_are_not_judged() -> None:
    assert gains(call("cross_entropy", torch.randn(6, 6), torch.arange(6)), 6, 1) is None
    assert gains(call("cross_entropy", torch.randn(6, 3), torch.ones(6, dtype=torch.long)), 6, 1) is None


def test_a_single_column_of_a_single_row_has_a_mark() -> None:
    ids = torch.arange(64)[None, ::32][:, :1]  # torch calls it contiguous, and its stride is 32
    assert ids.stride(-1) == 32
    assert row_marks([ids], 1, 1) == row_marks([torch.zeros(1, 1, dtype=torch.int64)], 1, 1)


def test_positions_of_a_single_row_are_no_rows(tmp_path: Path) -> None:
    verdict, _ = watched(Case(batch_size=1, steps=40), tmp_path)
    assert "unlearnable-data" not in [diagnosis.condition for diagnosis in verdict.diagnoses]
    chart = load_chart(tmp_path)
    assert not chart.facts["problems"]
    assert not len(chart["pairing_gain"]) and not len(chart["input_conflicts"])


@pytest.mark.parametrize("together", [True, False])
def test_targets_of_a_batch_are_not_those_of_one_of_its_rows(tmp_path: Path, together: bool) -> None:
    """Answers that are yes or no, and rows that are given to the model all at once or one by one."""
    torch.manual_seed(0)
    model = torch.nn.Linear(6, 1)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with sickbay.watch(out=tmp_path / "run") as doctor:
        for _ in range(8):
            x = torch.randn(12, 6)
            scores = model(x) if together else torch.cat([model(row[None]) for row in x])
            optimizer.zero_grad()
            F.binary_cross_entropy_with_logits(scores.squeeze(-1), (x[:, 0] > 0).float()).backward()
            optimizer.step()
    seen = doctor.chart()["input_conflicts"]
    assert [(reading.note["inputs"], reading.note["repeats"]) for reading in seen] == ([(96, 0)] if together else [])


def test_rows_of_equal_input_have_equal_marks_whichever_way_they_lie() -> None:
    ids = torch.tensor([[1, 2, 3], [1, 2, 3], [1, 2, 4], [0, 2, 3]])
    marks = row_marks([ids], 4, 4)
    assert marks[0] == marks[1]
    assert len(set(marks)) == 3
    assert row_marks([ids.t().contiguous()], 4, 4) == marks
    numbered = row_marks([ids, torch.arange(4.0)[:, None]], 4, 4)
    assert len(set(numbered)) == 4


def test_next_tokens_are_found_shifted_inside_or_outside_of_the_model_and_nothing_else_is() -> None:
    text = torch.arange(40).reshape(2, 20) % 13
    logits = torch.zeros(2 * 19, 13)
    outside = next_tokens([text[:, :-1]], call("cross_entropy", logits, text[:, 1:].reshape(-1)))
    inside = next_tokens([text], call("cross_entropy", logits, text[:, 1:].reshape(-1)))
    assert outside is not None
    assert inside is not None
    assert np.array_equal(outside.ids, inside.ids)
    assert np.array_equal(outside.targets, text[:, 1:].numpy())
    assert next_tokens([text], call("cross_entropy", torch.zeros(40, 13), text.reshape(-1))) is None


def examples(x: torch.Tensor, y: torch.Tensor) -> Examples:
    kept = Examples()
    kept.add([x], y, np.ones(len(x), dtype=bool), len(x), not y.is_floating_point(), -100)
    return kept


def test_examples_tell_data_from_trials() -> None:
    torch.manual_seed(0)
    label = torch.randint(0, 2, (300, 1))
    padded = torch.randint(3, 50, (300, 20))
    padded[:, 12:] *= torch.rand(300, 8) < 0.5
    assert examples(padded, label).look_made_up()
    assert examples(torch.randn(300, 3, 8, 8), label).look_made_up()
    assert not examples((padded**2) // 50, label).look_made_up()
    assert not examples(torch.randn(300, 64).cumsum(1), label).look_made_up()
    assert examples(torch.randint(0, 9, (300, 3)), label).columns() == 3


def test_next_tokens_are_known_to_belong_together() -> None:
    text = torch.randint(0, 50, (300, 12))
    assert examples(text[:, :-1], text[:, 1:]).continues
    assert not examples(text[:, :-1], text[:, 1:].roll(1, 0)).continues


def test_of_overlapping_crops_each_stretch_of_text_is_counted_once(tmp_path: Path) -> None:
    torch.manual_seed(0)
    text = torch.randint(0, 50, (2000,))
    patient = Patient()
    record = RecordWriter(tmp_path, 0)
    corpus = Corpus(patient, record, Loop(patient, record))
    for start in (*range(0, 1900, 20), *range(0, 1900, 7)):
        targets = text[start + 1 : start + 41]
        found = next_tokens([text[start : start + 40].view(1, -1)], call("cross_entropy", torch.zeros(40, 50), targets))
        assert found is not None
        corpus.read(found, call("cross_entropy", torch.zeros(40, 50), targets))
    record.close()
    assert patient.corpus is not None
    assert 1900 < patient.corpus.tokens < 2100


@pytest.mark.parametrize("together", [True, False])
def test_pixels_say_something_about_the_classes_of_pixels(together: bool) -> None:
    rng = np.random.default_rng(0)
    masks = np.zeros((400, 16, 16))
    for mask, (top, left, height, width) in zip(masks, rng.integers(2, 9, (400, 4))):
        mask[top : top + height, left : left + width] = 1
    images = torch.from_numpy(masks + rng.normal(size=masks.shape)).unsqueeze(1)
    labels = torch.from_numpy(masks).long().reshape(400, -1)
    kept = examples(images, labels if together else labels.roll(7, 0))
    assert (dependence_z(kept.features(), kept.targets()) > 4.0) is together
