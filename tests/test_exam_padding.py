"""Padding that nobody declares is known by where its id stands."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

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
