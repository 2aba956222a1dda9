"""Ids that no text has (masks, sentinels, begin and end) as people read and write them, beside a tokenizer's own."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

import numpy as np
from torch import Tensor

from sickbay.reference.text.tokenizer import Ids, Tokenizer, checked


class Marked:
    """A tokenizer whose ids are followed by one for each of `marks`, "" for one that is not shown.

    As a Tokenizer it is that of a target: every text begins with `begin`, where there is one, and ends with `end`.
    """

    def __init__(self, tokenizer: Tokenizer, marks: Sequence[str], begin: int | None = None, end: int | None = None) -> None:
        self._tokenizer, self._marks, self._begin = tokenizer, marks, begin
        self._id_of = {mark: tokenizer.vocab_size + number for number, mark in enumerate(marks) if mark}
        self.vocab_size, self.end_of_text = tokenizer.vocab_size + len(marks), end

    def read(self, text: str) -> Ids:
        """Ids `(N,)` of a source: marks in it stand for their ids. Raises ValueError for text that has no ids."""
        parts = re.split(f"({'|'.join(map(re.escape, self._id_of))})", text) if self._id_of else [text]
        ids = [np.array([self._id_of[part]]) if part in self._id_of else self._tokenizer.encode(part) for part in parts if part]
        return np.concatenate([np.empty(0, dtype=np.int64), *ids])

    def encode(self, text: str) -> Ids:
        begin = [] if self._begin is None else [self._begin]
        return np.concatenate([np.array(begin, dtype=np.int64), self._tokenizer.encode(text)])

    def decode(self, ids: Sequence[int] | Tensor | Ids) -> str:
        plain, text = self._tokenizer.vocab_size, ""
        run: list[int] = []
        for number in checked(ids, self.vocab_size):
            if number < plain:
                run.append(number)
            else:
                text, run = text + self._tokenizer.decode(run) + self._marks[number - plain], []
        return text + self._tokenizer.decode(run)

    def pieces(self, chunks: Iterable[str]) -> Iterator[str]:
        return self._tokenizer.pieces(chunks)

    def save(self, path: Path) -> None:
        self._tokenizer.save(path)
