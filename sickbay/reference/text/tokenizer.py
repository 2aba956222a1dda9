"""Text to ids and back: characters, bytes, and (in bpe.py) what the `tokenizers` library reads.

A tokenizer is one file, tokenizer.json. `pieces` cuts a text that is larger than memory so that the ids do not change:

    for piece in tokenizer.pieces(chunks):
        write(tokenizer.encode(piece))
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Protocol

import numpy as np
import numpy.typing as npt
from torch import Tensor

CHUNK = 1 << 20  # characters read at a time
END_OF_TEXT = "<|endoftext|>"  # Radford et al. 2019 (GPT-2)

Ids = npt.NDArray[np.int64]


class Tokenizer(Protocol):
    """Ids from 0 to `vocab_size` - 1. `end_of_text`: the id that separates documents, which no text is encoded to; None = there is none."""

    @property
    def vocab_size(self) -> int: ...

    @property
    def end_of_text(self) -> int | None: ...

    def encode(self, text: str) -> Ids:
        """Ids `(N,)` int64. Raises ValueError for text that has no ids."""
        ...

    def decode(self, ids: Sequence[int] | Tensor | Ids) -> str:
        """The text of `ids`, bytes that are no UTF-8 as U+FFFD. Raises IndexError for an id beyond the vocabulary, ValueError below 0."""
        ...

    def pieces(self, chunks: Iterable[str]) -> Iterator[str]:
        """The text of `chunks` in other pieces, whose ids one after another are those of the whole text."""
        ...

    def save(self, path: Path) -> None:
        """The tokenizer stands in the file `path`, for `load`."""
        ...


class CharTokenizer:
    """One id per character, in the order of `characters`."""

    end_of_text: int | None = None

    def __init__(self, characters: str) -> None:
        if len(set(characters)) != len(characters) or not characters:
            raise ValueError(f"characters must be distinct and at least one; got {characters!r}")
        self.characters = characters
        self._id_of = {character: number for number, character in enumerate(characters)}

    @classmethod
    def of_texts(cls, texts: Iterable[str]) -> CharTokenizer:
        """The tokenizer of all characters of `texts`, sorted. Raises ValueError where there is none."""
        seen: set[str] = set()
        for text in texts:
            seen.update(text)
        return cls("".join(sorted(seen)))

    @classmethod
    def of_text(cls, path: Path) -> CharTokenizer:
        """The tokenizer of the UTF-8 file at `path`. Raises OSError, UnicodeDecodeError, ValueError (empty)."""
        if path.stat().st_size == 0:
            raise ValueError(f"{path} is empty")
        with path.open(encoding="utf-8", newline="") as file:
            return cls.of_texts(iter(partial(file.read, CHUNK), ""))

    @property
    def vocab_size(self) -> int:
        return len(self.characters)

    def encode(self, text: str) -> Ids:
        """Ids `(len(text),)`. Raises ValueError naming the first character without an id."""
        try:
            return np.fromiter((self._id_of[character] for character in text), dtype=np.int64, count=len(text))
        except KeyError as missing:
            character = missing.args[0]
            raise ValueError(f"{character!r} (character {text.index(character)}) is not among the tokenizer's {self.vocab_size}") from None

    def decode(self, ids: Sequence[int] | Tensor | Ids) -> str:
        return "".join(self.characters[number] for number in checked(ids, self.vocab_size))

    def pieces(self, chunks: Iterable[str]) -> Iterator[str]:
        return iter(chunks)

    def save(self, path: Path) -> None:
        _write(path, {"kind": "characters", "characters": self.characters})

    @classmethod
    def load(cls, path: Path) -> CharTokenizer:
        return cls(json.loads(path.read_text(encoding="utf-8"))["characters"])


class ByteTokenizer:
    """One id per byte of the text's UTF-8, then `end_of_text`: every text has ids, whatever it was trained on."""

    vocab_size = 257
    end_of_text: int | None = 256

    def encode(self, text: str) -> Ids:
        return np.frombuffer(utf8(text), dtype=np.uint8).astype(np.int64)

    def decode(self, ids: Sequence[int] | Tensor | Ids) -> str:
        numbers = checked(ids, self.vocab_size)
        return b"".join(bytes((number,)) if number < 256 else END_OF_TEXT.encode() for number in numbers).decode("utf-8", errors="replace")

    def pieces(self, chunks: Iterable[str]) -> Iterator[str]:
        return iter(chunks)

    def save(self, path: Path) -> None:
        _write(path, {"kind": "bytes"})


def load(path: Path) -> Tokenizer:
    """The tokenizer of the tokenizer.json at or in `path`, of any kind.

    Raises OSError, ValueError where the file holds no tokenizer, UsageError where its library is not installed.
    """
    file = path / "tokenizer.json" if path.is_dir() else path
    try:
        held = json.loads(file.read_text(encoding="utf-8"))
        kind = held.get("kind", "library" if "model" in held else None)
        if kind == "characters":
            return CharTokenizer(held["characters"])
    except (ValueError, KeyError, TypeError, AttributeError) as problem:
        raise ValueError(f"{file} is not a readable tokenizer: {problem}") from problem
    if kind == "bytes":
        return ByteTokenizer()
    if kind == "library":
        from sickbay.reference.text.bpe import LibraryTokenizer

        return LibraryTokenizer.load(file)
    raise ValueError(f"{file} is not a readable tokenizer: it has neither a known kind (characters, bytes) nor the library's model")


def checked(ids: Sequence[int] | Tensor | Ids, vocab_size: int) -> list[int]:
    """`ids` as a list. Raises IndexError, ValueError as `Tokenizer.decode` does."""
    numbers = [int(number) for number in ids]
    if numbers and min(numbers) < 0:
        raise ValueError(f"ids must not be negative; the least is {min(numbers)}")
    if numbers and max(numbers) >= vocab_size:
        raise IndexError(f"id {max(numbers)} is beyond the vocabulary; ids go from 0 to {vocab_size - 1}")
    return numbers


def utf8(text: str) -> bytes:
    """The text's bytes. Raises ValueError for half a surrogate pair, which no file's text can hold."""
    try:
        return text.encode("utf-8")
    except UnicodeEncodeError as problem:
        raise ValueError(
            f"character {problem.start} of the text ({text[problem.start]!r}) is half a surrogate pair, not a character"
        ) from None


def _write(path: Path, held: dict[str, str]) -> None:
    path.write_text(json.dumps(held) + "\n", encoding="utf-8")
