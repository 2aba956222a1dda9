"""Padding that nobody declares is known by where its id stands."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from exam_models import Answers, answers, padded, patient_of
from torch import Tensor, nn

from sickbay.exams.padding import find_padding
from sickbay.exams.sequences import Lookup, Observation

END, FILL = 27, 29


def rows(lengths: list[int], end: int | None = END) -> Tensor:
    """Letters below 26, an end token if any, the rest of 12 places filled."""
    torch.manual_seed(0)
    ids = torch.full((len(lengths), 12), FILL)
    for row, length in enumerate(lengths):
        ids[row, :length] = torch.randint(26, (length,))
        if end is not None:
            ids[row, length] = end
    return ids


def padding_of(ids: Tensor) -> Tensor | None:
    found = find_padding(ids, 1, [Lookup(0, None, ids, tuple(ids.shape), -1, "")], Observation(), [], None, None)
    return None if found is None else found.mask


@pytest.mark.parametrize("lengths", [[11, 10, 9, 8, 11, 10, 9, 10], [11, 11, 9, 10, 9, 9, 10, 8]])
def test_short_runs_after_an_end_token_are_padding(lengths: list[int]) -> None:
    mask = padding_of(rows(lengths))
    assert mask is not None
    assert mask.sum(1).tolist() == [11 - length for length in lengths]


def test_short_runs_after_letters_may_be_letters() -> None:
    assert padding_of(rows([12, 11, 10, 10, 12, 11, 10, 11], end=None)) is None


def test_sorted_digits_are_no_padding() -> None:
    torch.manual_seed(0)
    assert all(padding_of(torch.randint(10, (16, 12)).sort(1).values) is None for _ in range(50))


class Reader(nn.Module):
    """A padded text's class by one convolution and a maximum, or from the state after the last position."""

    def __init__(self, recurrent: bool) -> None:
        super().__init__()
        self.tokens, self.leave = nn.Embedding(31, 16, padding_idx=0), nn.Linear(16, 3)
        self.mix: nn.Module = nn.GRU(16, 16, batch_first=True) if recurrent else nn.Conv1d(16, 16, 3, padding=1)
        self.recurrent, self.drop = recurrent, nn.Dropout(0.2)

    def forward(self, ids: Tensor) -> Tensor:
        x = self.tokens(ids)
        last: Tensor = self.mix(x)[0][:, -1] if self.recurrent else F.relu(self.mix(x.mT)).amax(-1)
        return self.leave(self.drop(last))


def classified(model: nn.Module) -> Answers:
    torch.manual_seed(0)
    ids, _ = padded(rows=12)
    patient, logits = patient_of(model, ids)
    return answers(patient, F.cross_entropy(logits, torch.randint(3, (12,))))


@pytest.mark.parametrize("recurrent", [False, True])
def test_what_stands_in_the_padding_and_how_far_it_goes_are_two_things(recurrent: bool) -> None:
    torch.manual_seed(0)
    found = classified(Reader(recurrent))
    assert found["padding_influence"] > 0.01
    assert (found.note("padding_influence")["cut"] < 0.1) is not recurrent


class WrongWayRound(Reader):
    def forward(self, ids: Tensor) -> Tensor:
        void = (ids == 0)[..., None]
        places = torch.linspace(0, 1, ids.shape[1])[:, None]
        return self.leave((self.tokens(ids) + places).mul(void).sum(1) / void.sum(1).clamp(min=1))


def test_a_mask_the_wrong_way_round_sees_padding_only() -> None:
    torch.manual_seed(0)
    assert classified(WrongWayRound(False))["padding_influence"] > 100


class Masked(nn.Module):
    """A convolution, then attention that masks padding, whose rows in the table are zeros or not."""

    def __init__(self, empty: bool) -> None:
        super().__init__()
        self.tokens = nn.Embedding(40, 16, padding_idx=0)
        self.near = nn.Conv1d(16, 16, 3, padding=1)
        self.far = nn.TransformerEncoderLayer(16, 2, 32, dropout=0.0, batch_first=True)
        self.leave = nn.Linear(16, 3)
        if not empty:
            nn.init.normal_(self.tokens.weight)

    def forward(self, ids: Tensor) -> Tensor:
        pad = ids == 0
        x = self.tokens(ids)
        x = self.far(x + self.near(x.mT).mT, src_key_padding_mask=pad)
        return self.leave(x.masked_fill(pad[..., None], 0).sum(1) / (~pad).sum(1, keepdim=True))


@pytest.mark.parametrize("empty", [False, True])
def test_a_place_that_is_looked_up_as_zeros_is_no_padding_to_attend_to(empty: bool) -> None:
    torch.manual_seed(0)
    found = classified(Masked(empty))
    cut = found.note("padding_influence").get("cut")
    assert found["padding_influence"] > 0.001
    assert (cut is not None and cut < 1e-4) is empty
