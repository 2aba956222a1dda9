"""Text to token batches: tokens in a memory-mapped file, and batches known by their number."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from sickbay.reference.tokenizer import CharTokenizer as CharTokenizer

TRAIN_TENTHS = 9
CHUNK = 1 << 20
Tokens = npt.NDArray[Any]
Batch = tuple[Tensor, Tensor]


def read_chunks(path: Path) -> Iterator[str]:
    """The UTF-8 file's text in pieces, line ends as they stand, so that a file larger than memory can be read."""
    with path.open(encoding="utf-8", newline="") as file:
        while chunk := file.read(CHUNK):
            yield chunk


def write_tokens(text: Path, tokenizer: CharTokenizer, target: Path) -> None:
    """The ids of `text` stand in `target`, little-endian uint16 (uint32 beyond 65,536 characters), renamed into place when complete."""
    partial = target.with_name(target.name + ".partial")
    with partial.open("wb") as file:
        for chunk in read_chunks(text):
            file.write(tokenizer.encode(chunk).astype(token_type(tokenizer.vocab_size)).tobytes())
    partial.replace(target)


def open_tokens(path: Path, vocab_size: int) -> Tokens:
    """The ids of `path`, mapped, not read: pages are loaded as batches touch them."""
    return np.memmap(path, dtype=token_type(vocab_size), mode="r")


def token_type(vocab_size: int) -> str:
    return "<u2" if vocab_size <= 1 << 16 else "<u4"


def split(tokens: Tokens, part: str) -> Tokens:
    """The first nine tenths of `tokens` for "train", the rest for any other part."""
    cut = len(tokens) * TRAIN_TENTHS // 10
    return tokens[:cut] if part == "train" else tokens[cut:]


def demand_length(tokens: Tokens, context: int, part: str) -> None:
    """Raises ValueError unless `tokens` hold one window of `context` inputs and their targets."""
    if len(tokens) < context + 1:
        raise ValueError(
            f"the {part} split has {len(tokens)} tokens; context={context} needs at least {context + 1}: more text or a smaller context"
        )


def demand_size(text: Path, context: int) -> None:
    """Raises ValueError where the file has too few bytes for the smaller split to hold one window, whatever its characters."""
    size, least = text.stat().st_size, 10 * context // (10 - TRAIN_TENTHS) + 1
    if size < least:
        raise ValueError(f"{text} has {size:,} bytes; context={context} needs at least {least:,}: more text or a smaller context")


def windows(tokens: Tokens, starts: npt.NDArray[np.int64], context: int) -> Batch:
    """Inputs and next-token targets `(len(starts), context)` int64, one row from each start."""
    rows = torch.from_numpy(tokens[starts[:, None] + np.arange(context + 1)].astype(np.int64))
    return rows[:, :-1].contiguous(), rows[:, 1:].contiguous()


def random_batches(tokens: Tokens, context: int, batch_size: int, seed: int, first: int = 0) -> Iterator[Batch]:
    """Endless batches of windows at random places. Batch n depends on `seed` and n alone, so a run resumes by its number."""
    demand_length(tokens, context, "chosen")
    number = first
    while True:
        starts = np.random.default_rng((seed, number)).integers(0, len(tokens) - context, size=batch_size)
        yield windows(tokens, starts, context)
        number += 1


def spread_batches(tokens: Tokens, context: int, batch_size: int, most_rows: int | None = None) -> Iterator[Batch]:
    """Windows that do not overlap, in order, each token at most once; at most `most_rows` of them, evenly spread over `tokens`."""
    demand_length(tokens, context, "chosen")
    starts = np.arange(0, len(tokens) - context, context)
    if most_rows is not None and most_rows < len(starts):
        starts = starts[np.linspace(0, len(starts) - 1, most_rows).round().astype(np.int64)]
    for begin in range(0, len(starts), batch_size):
        yield windows(tokens, starts[begin : begin + batch_size], context)


@dataclass(frozen=True)
class Corpus:
    """A text as tokens on disk. `source`: sha256 of the text; `bytes_per_token`: mean UTF-8 bytes of one token."""

    tokenizer: CharTokenizer
    tokens: Tokens
    source: str
    bytes_per_token: float


def prepare(text: Path, folder: Path, tokenizer: CharTokenizer | None = None) -> Corpus:
    """`folder` holds tokens.bin, the ids of `text`, memory-mapped in the result. Raises OSError, UnicodeDecodeError, ValueError.

    `tokenizer`: None = one made of the text's own characters.
    """
    tokenizer = tokenizer or CharTokenizer.of_text(text)
    folder.mkdir(parents=True, exist_ok=True)
    write_tokens(text, tokenizer, folder / "tokens.bin")
    tokens = open_tokens(folder / "tokens.bin", tokenizer.vocab_size)
    return Corpus(tokenizer, tokens, fingerprint(text), text.stat().st_size / len(tokens))


def fingerprint(path: Path) -> str:
    """sha256 of the file's bytes, in hex."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while chunk := file.read(CHUNK):
            digest.update(chunk)
    return digest.hexdigest()


def shipped_text() -> Path:
    """The path of the shipped Tiny Shakespeare. Raises FileNotFoundError where it was not installed."""
    here = Path(__file__).resolve().parent
    places = (here / "tinyshakespeare.txt", here.parents[1] / "examples" / "data" / "tinyshakespeare.txt")
    for place in places:
        if place.is_file():
            return place
    raise FileNotFoundError(f"tinyshakespeare.txt is neither at {places[0]} nor at {places[1]}")
