"""An end token that fills rows up as well is told from plain padding by how the rows of real trainings end."""

from __future__ import annotations

import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import sickbay
from sickbay.core.chart import Chart
from sickbay.core.reader import load_chart

END, OTHER, STEPS, ROWS = 20, 21, 12, 8

Made = Callable[[list[list[int]]], tuple[Tensor, Tensor]]  # texts -> what the model is given, the targets


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.tokens, self.head = nn.Embedding(22, 8), nn.Linear(8, 22)

    def forward(self, ids: Tensor) -> Tensor:
        return self.head(self.tokens(ids).cumsum(1))


def filled(rows: list[list[int]], pad: int, width: int = 0) -> Tensor:
    width = width or max(map(len, rows))
    return torch.tensor([row + [pad] * (width - len(row)) for row in rows])


def ignoring(targets: Tensor, pad: int) -> Tensor:
    return targets.masked_fill(targets == pad, -100)


def shared(rows: list[list[int]]) -> tuple[Tensor, Tensor]:
    ids = filled([[*row, END] for row in rows], END)
    return ids, F.pad(ignoring(ids[:, 1:], END), (0, 1), value=-100)


def shared_and_cut(rows: list[list[int]]) -> tuple[Tensor, Tensor]:
    ids = filled([[*row, END] for row in rows], END)
    return ids[:, :-1], ignoring(ids[:, 1:], END)


def begun_with_the_same(rows: list[list[int]]) -> tuple[Tensor, Tensor]:
    return shared([[END, *row] for row in rows])


def counted_once(rows: list[list[int]]) -> tuple[Tensor, Tensor]:
    ids, targets = shared(rows)
    return ids, torch.stack([row.index_fill(0, torch.tensor([len(text) - 1]), END) for row, text in zip(targets, rows)])


def of_its_own(rows: list[list[int]]) -> tuple[Tensor, Tensor]:
    ids = filled([[*row, END] for row in rows], OTHER)
    return ids[:, :-1], ignoring(ids[:, 1:], OTHER)


def of_its_own_and_one_more(rows: list[list[int]]) -> tuple[Tensor, Tensor]:
    ids = filled([[*row, END] for row in rows], OTHER, 2 + max(map(len, rows)))
    return ids[:, :-1], ignoring(ids[:, 1:], OTHER)


def without_an_end(rows: list[list[int]]) -> tuple[Tensor, Tensor]:
    ids = filled(rows, OTHER)
    return ids, F.pad(ignoring(ids[:, 1:], OTHER), (0, 1), value=-100)


def of_one_width(rows: list[list[int]]) -> tuple[Tensor, Tensor]:
    ids = filled(rows, OTHER, 14)
    return ids, F.pad(ignoring(ids[:, 1:], OTHER), (0, 1), value=-100)


def trained(folder: Path, make: Made) -> Chart:
    random.seed(0)
    torch.manual_seed(0)
    with sickbay.watch(out=folder):
        model = Model()
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        for _ in range(STEPS):
            ids, targets = make([[random.randrange(20) for _ in range(random.randint(3, 12))] for _ in range(ROWS)])
            loss = F.cross_entropy(model(ids).flatten(0, 1), targets.flatten())
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
    return load_chart(folder)


def told(folder: Path, make: Made) -> list[Any]:
    return [r for r in trained(folder, make)["eos_targets"] if "longest row" in r.note["known_by"]]


@pytest.mark.parametrize("make", [shared, shared_and_cut, begun_with_the_same])
def test_an_end_token_that_is_padding_too_is_never_asked_for(tmp_path: Path, make: Made) -> None:
    (reading,) = told(tmp_path / "run", make)
    assert reading.value == 0 and reading.note["eos_id"] == END and reading.note["eos_in_inputs"] % ROWS == 0


@pytest.mark.parametrize("make", [counted_once, of_its_own, of_its_own_and_one_more, without_an_end, of_one_width])
def test_padding_alone_and_ends_that_are_asked_for_say_nothing(tmp_path: Path, make: Made) -> None:
    assert told(tmp_path / "run", make) == []


class Translator(Model):
    def forward(self, source: Tensor, ids: Tensor) -> Tensor:  # type: ignore[override]
        return super().forward(ids) + self.head(self.tokens(source)).sum(1, keepdim=True)


@pytest.mark.parametrize("own", [False, True])
def test_answers_of_one_width_are_told_by_sources_that_end_alike(tmp_path: Path, own: bool) -> None:
    """Where padding has an id of its own, the longest source ends with none, and answers of one width may be filled beyond it."""
    random.seed(0)
    torch.manual_seed(0)
    texts = [[[random.randrange(20) for _ in range(n)] for n in random.choices(range(3, 12), k=ROWS)] for _ in range(STEPS)]
    with sickbay.watch(out=tmp_path / "run"):
        model = Translator()
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        for rows in texts:
            source = filled([row if own else [*row, END] for row in rows], END)
            ids = filled([[*row[: 4 + index % 3], END] for index, row in enumerate([[*row, *row] for row in rows])], END, 7)
            loss = F.cross_entropy(model(source, ids).flatten(0, 1), F.pad(ignoring(ids[:, 1:], END), (0, 1), value=-100).flatten())
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
    told = [r for r in load_chart(tmp_path / "run")["eos_targets"] if "longest row" in r.note["known_by"]]
    assert len(told) == (not own)
