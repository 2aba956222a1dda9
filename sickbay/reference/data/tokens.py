"""Texts as tokens on disk: little-endian numbers, written piece by piece and mapped, not read, by those who train."""

from __future__ import annotations

import os
from array import array
from collections.abc import Iterator
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from typing import BinaryIO

import numpy as np

from sickbay.core.errors import UsageError
from sickbay.reference.data.batches import Tokens
from sickbay.reference.data.pairs import Translation
from sickbay.reference.data.sources import CHUNK, Report, Text, nobody
from sickbay.reference.text.tokenizer import Tokenizer

SPLIT_SEED = 0
Span = tuple[int, int]


@dataclass(frozen=True)
class Written:
    """What `write_tokens` wrote: tokens and UTF-8 bytes of each document."""

    lengths: array[int]
    text_bytes: array[int]


def token_type(vocab_size: int) -> str:
    """The smallest type that holds every id: two bytes up to 65,536 of them, else four."""
    return "<u2" if vocab_size <= 1 << 16 else "<u4"


def open_tokens(path: Path, vocab_size: int) -> Tokens:
    """The ids of `path`, mapped, not read: pages are loaded as batches touch them."""
    if path.stat().st_size == 0:  # nothing cannot be mapped
        return np.empty(0, dtype=token_type(vocab_size))
    return np.memmap(path, dtype=token_type(vocab_size), mode="r")


def write_tokens(text: Text, tokenizer: Tokenizer, target: Path, report: Report = nobody) -> Written:
    """The ids of `text` stand in `target`, each of several documents followed by `separator`. Raises UsageError, OSError."""
    written = Written(array("Q"), array("Q"))
    dtype, end = token_type(tokenizer.vocab_size), separator(text, tokenizer)
    with target.open("wb") as file:
        for document in text.documents(report):
            count = size = 0
            for piece in tokenizer.pieces(document.chunks):
                try:
                    ids = tokenizer.encode(piece)
                except ValueError as problem:
                    raise UsageError(f"{document.place}: {problem}; the tokenizers bytes and bpe know every text") from problem
                file.write(ids.astype(dtype).tobytes())
                count, size = count + len(ids), size + len(piece.encode("utf-8"))
            if count:
                file.write(np.array(end, dtype=dtype).tobytes())
            written.lengths.append(count + len(end) if count else 0)
            written.text_bytes.append(size)
        file.flush()
        os.fsync(file.fileno())
    return written


def write_pairs(text: Text, tokenizer: Tokenizer, target: Path, report: Report = nobody) -> Written:
    """The ids of the pairs of `text` stand in `target`, each as `source begin target end`. Raises UsageError, OSError."""
    written, objective = Written(array("Q"), array("Q")), Translation(tokenizer.vocab_size)
    dtype, marks = token_type(objective.vocab_size + objective.extra_ids), (objective.begin_id, objective.end_id)
    with target.open("wb") as file:
        documents = text.documents(report)
        for pair in zip(documents, documents):
            count = size = 0
            for document, mark in zip(pair, marks):
                side = "".join(document.chunks)
                try:
                    ids = np.append(tokenizer.encode(side), mark)
                except ValueError as problem:
                    raise UsageError(f"{document.place}: {problem}; the tokenizers bytes and bpe know every text") from problem
                file.write(ids.astype(dtype).tobytes())
                count, size = count + len(ids), size + len(side.encode("utf-8"))
            written.lengths.append(count)
            written.text_bytes.append(size)
        file.flush()
        os.fsync(file.fileno())
    return written


def separator(text: Text, tokenizer: Tokenizer) -> list[int]:
    """What stands after each document: nothing after a single text, else `end_of_text` or, where there is none, a line end."""
    if not text.several:
        return []
    return tokenizer.encode("\n").tolist() if tokenizer.end_of_text is None else [tokenizer.end_of_text]


def validation_spans(lengths: array[int], share: float) -> list[Span]:
    """Where the tokens for validation begin and end, in order, about `share` of all in documents of `lengths` tokens.

    Whole documents, drawn by a shuffle that is the same every time, until a further one would lead away from the share;
    one larger than the share stays in training. Where the smaller ones hold too little: the last tokens of all.
    """
    sizes = np.array(lengths, dtype=np.int64)
    ends, total = sizes.cumsum(), int(sizes.sum())
    if share == 0 or total == 0:
        return []
    # As a fraction of the decimal: 0.1 of a text is then exactly what nine tenths leave.
    wanted = Fraction(str(share)) * total
    candidates = np.flatnonzero(sizes <= float(wanted))
    if 2 * int(sizes[candidates].sum()) < wanted:
        return [(int(total - wanted), total)]
    drawn = np.random.default_rng(SPLIT_SEED).permutation(candidates)
    count = int(np.abs(sizes[drawn].cumsum() - float(wanted)).argmin()) + 1
    spans: list[Span] = []
    for number in np.sort(drawn[:count]).tolist():
        begin, end = int(ends[number] - sizes[number]), int(ends[number])
        if spans and spans[-1][1] == begin:
            begin = spans.pop()[0]
        spans.append((begin, end))
    return spans


def whole_documents(lengths: array[int], spans: list[Span]) -> bool:
    """Whether no document of `lengths` tokens is cut by `spans`."""
    borders = {0, *np.array(lengths, dtype=np.int64).cumsum().tolist()}
    return all(border in borders for span in spans for border in span)


def bytes_within(written: Written, spans: list[Span]) -> float:
    """UTF-8 bytes of the text whose tokens are in `spans`; of a document that is cut, in proportion to its tokens."""
    ends = np.concatenate(([0], np.array(written.lengths, dtype=np.int64).cumsum())).astype(np.float64)
    sizes = np.concatenate(([0], np.array(written.text_bytes, dtype=np.int64).cumsum())).astype(np.float64)
    return float(sum(np.interp(end, ends, sizes) - np.interp(begin, ends, sizes) for begin, end in spans))


def move(tokens: Path, spans: list[Span], target: Path, vocab_size: int) -> None:
    """The tokens of `spans` have gone from the file `tokens` into `target`; what was behind them has moved up."""
    width = np.dtype(token_type(vocab_size)).itemsize
    with tokens.open("r+b") as file, target.open("wb") as moved:
        stays = spans[0][0] * width if spans else file.seek(0, os.SEEK_END)
        for number, (begin, end) in enumerate(spans):
            for block in _blocks(file, begin * width, end * width):
                moved.write(block)
            until = spans[number + 1][0] * width if number + 1 < len(spans) else file.seek(0, os.SEEK_END)
            for block in _blocks(file, end * width, until):
                # Written before where it was read: what has not been read yet is never overwritten.
                file.seek(stays)
                stays += file.write(block)
        file.truncate(stays)
        for handle in (file, moved):
            handle.flush()
            os.fsync(handle.fileno())


def _blocks(file: BinaryIO, begin: int, end: int) -> Iterator[bytes]:
    while begin < end:
        file.seek(begin)
        block = file.read(min(CHUNK, end - begin))
        begin += len(block)
        yield block
