"""A model together with the rows of text it has read, so that reading one token more costs one position's work.

Suffixes: B rows, T positions, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from sickbay.reference.models.cache import Cache
from sickbay.reference.models.model import LanguageModel

PADDING = -1  # on the left of shorter rows: no vocabulary has it


class Reader:
    """Reads rows of ids and says what comes next in each.

    A row sees as much of its text as the context holds. When that is full, the row is read again from its last half on (the half
    rounded down, at least one token), which leaves room for as many more: a token then costs two positions' work on average, and what a row
    sees depends on nothing but its own length. Rows of different length are padded on the left; no row notices the others.
    """

    def __init__(self, model: LanguageModel, prompts: Sequence[Tensor], room: int) -> None:
        """`prompts`: each row's ids `(T,)` int64, at least one. `room`: most tokens that will be appended. Raises ValueError."""
        if len(prompts) == 0 or min(len(prompt) for prompt in prompts) == 0:
            raise ValueError("there is nothing to go on from: give at least one prompt, and each at least one token")
        self._model, self._context = model, model.config.context
        self.device = model.token_embedding.weight.device
        self._end = max(len(prompt) for prompt in prompts)
        self._ids_BT = torch.full((len(prompts), self._end + room), PADDING, dtype=torch.int64, device=self.device)
        for ids_T, prompt in zip(self._ids_BT, prompts):
            ids_T[self._end - len(prompt) : self._end] = prompt
        # The column from which on each row is read.
        self._first = [max(self._end - len(prompt), self._end - self._context) for prompt in prompts]
        most, dtype = self._ids_BT.shape[1], model.token_embedding.weight.dtype
        self._cache = Cache(model.config, len(prompts), device=self.device, dtype=dtype, positions=most)

    @property
    def written_BT(self) -> Tensor:
        """All ids so far, PADDING on the left of shorter rows."""
        return self._ids_BT[:, : self._end]

    def start(self) -> Tensor:
        """Logits `(B, V)` of what follows the prompts."""
        width = self._end - min(self._first)
        self._cache.clear([width - (self._end - first) for first in self._first])
        return self._logits(self._ids_BT[:, self._end - width : self._end].clamp(min=0))

    def append(self, chosen_B: Tensor) -> Tensor:
        """Logits `(B, V)` of what follows each row with its `chosen_B` at the end."""
        self._ids_BT[:, self._end] = chosen_B
        self._end += 1
        if self._cache.length < self._context:
            return self._logits(chosen_B[:, None])
        half = max(1, self._context // 2)
        self._first = [self._end - half if self._end - first > self._context else first for first in self._first]
        return self.start()

    def select(self, rows_B: Tensor) -> None:
        """Row i goes on from what row `rows_B[i]` was; there may be more rows than before, or fewer."""
        self._ids_BT = self._ids_BT[rows_B]
        self._first = [self._first[row] for row in rows_B.tolist()]
        self._cache.select(rows_B)

    def _logits(self, ids_BT: Tensor) -> Tensor:
        # The vocabulary's matrix is the largest of all: it is applied to the last position alone.
        return self._model.logits(self._model.hidden(ids_BT, cache=self._cache)[:, -1:])[:, -1]
