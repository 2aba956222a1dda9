"""A few hundred of the run's examples as small rows of numbers, for one test at the end of whether inputs tell anything about targets."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from sickbay.core.independence import is_independent_noise, is_uniform_noise

MOST = 400  # rows: with more the test gets slower by their square
_WIDTH = 256  # numbers of a row's input
_CLASSES = 64  # places that classes are spread over
_PLACES, _KINDS = 32, 8  # of a row with a class for each pixel or frame: places looked at, and what their classes are spread over
_TOKENS = 64  # of a row, for the question whether they look made up
_OFTEN = 5.0  # times the mean count: an id so frequent is padding or a mark
_MARKS = 3  # ids of that kind: padding, beginning, end
_NEXT = 0.5  # share of targets that are the next input

Matrix = NDArray[np.float64]


class Examples:
    """Rows seen for the first time, up to MOST of them; 1 MB at most."""

    def __init__(self) -> None:
        self._x: list[NDArray[Any]] = []
        self._y: list[NDArray[Any]] = []
        self._tokens: list[NDArray[Any]] = []
        self._dice = np.random.default_rng(0)
        self.continues = False  # the targets are the next tokens of an input: they belong together by construction

    def __len__(self) -> int:
        return len(self._x)

    def add(self, inputs: list[Tensor], targets: Tensor, fresh: NDArray[np.bool_], count: int, classes: bool, ignored: int) -> None:
        """Of the first rows of a batch of `count` those that are `fresh`: `targets` `(n, K)`."""
        chosen = np.flatnonzero(fresh)[: MOST - len(self)]
        rows = self._main(inputs, count)
        if classes and targets.shape[1] > 1 and not self.continues:
            self.continues = any(_follows(targets, tensor, ignored) for tensor in inputs)
        if rows is None or not len(chosen):
            return
        picked = rows[torch.from_numpy(chosen)].detach()
        wanted = targets[torch.from_numpy(chosen)]
        if picked.is_floating_point():
            flat = picked.reshape(len(chosen), -1)
            made = flat[:, :: max(1, -(-flat.shape[1] // _WIDTH))].double().numpy()
        else:
            ids = picked.reshape(len(chosen), -1).long().numpy()
            self._tokens.extend(ids[:, :_TOKENS].copy())
            made = np.zeros((len(chosen), _WIDTH))
            for row, tokens in zip(made, ids):
                np.add.at(row, tokens % _WIDTH, 1.0)
        if classes and wanted.shape[1] > 1 and picked.is_floating_point():
            answers = self._many_places(wanted, ignored)
        elif classes and wanted.shape[1] > 1:
            made, answers = self._one_place(picked, made, wanted, ignored)
        elif classes:
            answers = np.eye(_CLASSES)[(wanted[:, 0].numpy() % _CLASSES)]
        else:
            answers = wanted[:, :: max(1, -(-wanted.shape[1] // 8))].double().numpy()
        if self._x and (made.shape[1], answers.shape[1]) != (len(self._x[0]), len(self._y[0])):
            return
        self._x.extend(made.astype(np.float32))
        self._y.extend(answers.astype(np.float32))

    def _one_place(self, rows: Tensor, bags: Matrix, wanted: Tensor, ignored: int) -> tuple[Matrix, Matrix]:
        """Of each row one counted place: the tokens at, before and after it where inputs are as long as targets, and its target."""
        answers = np.zeros((len(wanted), _CLASSES))
        near = np.zeros((len(wanted), 3 * _CLASSES))
        aligned = rows.dim() == 2 and not rows.is_floating_point() and rows.shape[1] >= wanted.shape[1]
        for index, (row, targets) in enumerate(zip(rows, wanted)):
            places = np.flatnonzero(targets.numpy() != ignored)
            if not len(places):
                continue
            place = int(self._dice.choice(places))
            answers[index, int(targets[place]) % _CLASSES] = 1.0
            for side in (-1, 0, 1) if aligned else ():
                if 0 <= place + side < rows.shape[1]:
                    near[index, (side + 1) * _CLASSES + int(row[place + side]) % _CLASSES] = 1.0
        return (np.concatenate([bags, near], axis=1) if aligned else bags), answers

    @staticmethod
    def _many_places(wanted: Tensor, ignored: int) -> Matrix:
        """The same evenly spread places of every row, as pixels or frames have them: one says nothing to whom its position is unknown."""
        places = np.linspace(0, wanted.shape[1] - 1, min(_PLACES, wanted.shape[1])).astype(int)
        targets = wanted.numpy()[:, places]
        answers = np.eye(_KINDS)[targets % _KINDS] * (targets != ignored)[:, :, None]
        flat: Matrix = answers.reshape(len(targets), -1)
        return flat

    @staticmethod
    def _main(inputs: list[Tensor], count: int) -> Tensor | None:
        """The input that carries most: token ids before numbers, the largest first; rows along its first dimension."""
        rows = [
            t.transpose(0, 1) if t.dim() > 1 and t.shape[0] != count and t.shape[1] == count else t
            for t in inputs
            if t.device.type == "cpu"
        ]
        rows = [t for t in rows if t.shape[0] == count and not t.is_complex() and t.dtype != torch.bool]
        ids = [t for t in rows if not t.is_floating_point() and int(t.max()) > 1]
        return max(ids or [t for t in rows if t.is_floating_point()] or rows, key=Tensor.numel, default=None)

    def features(self) -> Matrix:
        """`(N, D)`: counts of hashed tokens, or numbers as they are."""
        return np.stack(self._x).astype(np.float64)

    def targets(self) -> Matrix:
        """`(N, K)`: one column for each hashed class, or numbers as they are."""
        return np.stack(self._y).astype(np.float64)

    def columns(self) -> int:
        """How many places of an input vary: tokens, or numbers."""
        width = min((len(row) for row in self._tokens), default=0)
        rows = np.stack([row[:width] for row in self._tokens]) if self._tokens else self.features()
        return int((rows != rows[0]).any(axis=0).sum())

    def look_made_up(self) -> bool:
        """True if the inputs are what randint, rand or randn give: a trial of the machinery, not data."""
        if not self._tokens:
            return is_independent_noise(self.features())
        width = min(len(row) for row in self._tokens)
        tokens = np.stack([row[:width] for row in self._tokens])
        tokens = tokens[:, (tokens != tokens[0]).any(axis=0)].reshape(-1)
        for _ in range(_MARKS):
            if not len(tokens):
                return False
            ids, counts = np.unique(tokens, return_counts=True)
            if counts.max() > _OFTEN * counts.mean():
                mark = ids[counts.argmax()]
                tokens = tokens[tokens != mark]
                tokens = np.where(tokens > mark, tokens - 1, tokens)
        return is_uniform_noise(tokens)


def _follows(targets: Tensor, ids: Tensor, ignored: int) -> bool:
    """True if most counted `targets` `(n, K)` are the token after theirs in `ids` `(B, T)`."""
    width = targets.shape[1] - 1
    if ids.dim() != 2 or ids.is_floating_point() or ids.shape[1] <= width or len(ids) < len(targets) or ids.device.type != "cpu":
        return False
    counted = targets[:, :width] != ignored
    same = (targets[:, :width] == ids[: len(targets), 1 : width + 1]) & counted
    return int(same.sum()) > _NEXT * int(counted.sum())
