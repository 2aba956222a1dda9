"""What the loss asks for, against targets whose offset, ignored share, padding and end tokens are known by construction."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from exam_models import Model, T, V, answers, captured, loss_of, padded, patient_of, text
from torch import Tensor


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


@pytest.mark.parametrize("offset", [0, 1, 2])
@pytest.mark.parametrize("inside", [False, True])
def test_the_offset_of_the_targets(offset: int, inside: bool) -> None:
    stream, _ = text(10, T + 3)
    ids, targets = stream[:, :T].clone(), stream[:, offset : offset + T].clone()
    if inside:
        patient, (_, loss) = patient_of(Model(), ids, targets)
    else:
        patient, logits = patient_of(Model(), ids)
        loss = loss_of(logits, targets)
    found = answers(patient, loss)
    assert found["target_offset"] == offset
    assert found.note("target_offset")["match"][str(offset)] == 1.0


Loss = Callable[[Tensor, Tensor, Tensor], Tensor]
LOSSES: dict[str, tuple[Loss, int]] = {
    "shifted inside the loss": (lambda o, x, y: loss_of(o[:, :-1], x[:, 1:]), 1),
    "shifted a second time": (lambda o, x, y: loss_of(o[:, :-1], y[:, 1:]), 2),
    "both cut alike": (lambda o, x, y: loss_of(o[:, 1:], x[:, 1:]), 0),
    "classes second": (lambda o, x, y: F.cross_entropy(o.transpose(1, 2), y), 1),
    "gathered": (lambda o, x, y: -o.log_softmax(-1).gather(-1, y[..., None]).mean(), 1),
    "indexed": (lambda o, x, y: -o.flatten(0, 1).log_softmax(-1)[torch.arange(y.numel()), y.flatten()].mean(), 1),
    "selected": (lambda o, x, y: loss_of(o[y > 5], y[y > 5]), 1),
    "smoothed": (lambda o, x, y: loss_of(o, y, label_smoothing=0.1), 1),
    "transposed": (lambda o, x, y: loss_of(o.transpose(0, 1), y.t()), 1),
}


@pytest.mark.parametrize("name", LOSSES)
def test_losses_of_many_hands(name: str) -> None:
    loss, offset = LOSSES[name]
    ids, targets = text()
    patient, logits = patient_of(Model(), ids)
    assert answers(patient, loss(logits, ids, targets))["target_offset"] == offset


def test_targets_given_as_distributions() -> None:
    ids, targets = text()
    patient, logits = patient_of(Model(), ids)
    rows, wanted = logits.flatten(0, 1).log_softmax(-1), F.one_hot(targets.flatten(), V).float()
    loss = F.kl_div(rows, wanted, reduction="batchmean")
    captured(patient, "kl_div", rows, wanted, loss)
    assert answers(patient, loss)["target_offset"] == 1


def test_masked_tokens_have_no_offset() -> None:
    ids, _ = text()
    picked = torch.rand(ids.shape) < 0.3
    patient, logits = patient_of(Model("full"), ids.masked_fill(picked, 1))
    found = answers(patient, loss_of(logits, ids.masked_fill(~picked, -100)))
    assert found["target_offset"] == -1 and "future_influence" not in found
    assert found["ignored_targets"] == pytest.approx(float((~picked).float().mean()))


def test_repetitive_tokens_leave_the_offset_open() -> None:
    ids = torch.full((6, T), 4)
    ids[:, -1] = 5
    patient, logits = patient_of(Model(), ids)
    found = answers(patient, loss_of(logits, torch.full((6, T), 4)))
    assert "target_offset" not in found and "repeat" in found.reasons["target_offset"]


def weighted(o: Tensor, y: Tensor, real: Tensor) -> Tensor:
    return (F.cross_entropy(o.flatten(0, 1), y.flatten(), reduction="none") * real.flatten()).sum() / real.sum()


@pytest.mark.parametrize(
    ("loss", "counts"),
    [
        (lambda o, y, real: loss_of(o, y), True),
        (lambda o, y, real: loss_of(o, y, ignore_index=0), False),
        (lambda o, y, real: weighted(o, y, real), False),
        (lambda o, y, real: -o.log_softmax(-1).gather(-1, y[..., None]).mean(), True),
        (lambda o, y, real: loss_of(o[real == 1], y[real == 1]), False),
    ],
    ids=["all", "ignore_index", "weights", "gathered", "selected"],
)
def test_padding_among_the_targets(loss: Callable[[Tensor, Tensor, Tensor], Tensor], counts: bool) -> None:
    rows, _ = padded(10, T + 1)
    ids, targets = rows[:, :-1], rows[:, 1:]
    patient, logits = patient_of(Model(), ids, attention_mask=(ids != 0).long())
    found = answers(patient, loss(logits, targets, (targets != 0).long()))
    expected = float(((ids == 0) & (targets == 0)).float().mean()) if counts else 0.0
    assert found["padding_counted"] == pytest.approx(expected)


@pytest.mark.parametrize("masked", [True, False])
def test_an_end_token_that_is_also_padding(masked: bool) -> None:
    end = 2
    ids, real = padded(pad=end)
    ids[torch.arange(len(ids)), real.sum(1) - 1] = end  # each text ends in a real end token, then padding of the same id
    labels = ids.masked_fill(ids == end if masked else real == 0, -100)
    patient, logits = patient_of(Model(), ids, attention_mask=real)
    found = answers(patient, loss_of(logits[:, :-1], labels[:, 1:]))
    assert found["eos_targets"] == (0 if masked else len(ids))
    assert found.note("eos_targets")["eos_in_inputs"] == len(ids)
