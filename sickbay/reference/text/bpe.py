"""Byte-level BPE trained on a text, and every tokenizer that the `tokenizers` library reads.

Byte pair encoding: Sennrich et al. 2016; over bytes, so that no text is unknown: Radford et al. 2019 (GPT-2), section 2.2.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING

import numpy as np
from torch import Tensor

from sickbay.core.errors import UsageError
from sickbay.reference.text.cuts import Cuts
from sickbay.reference.text.tokenizer import CHUNK, END_OF_TEXT, Ids, checked, utf8

if TYPE_CHECKING:
    import tokenizers

BYTES = 256
PIECE = 1 << 16  # characters of one piece: the library encodes pieces side by side
LEAST_COUNT = 2  # a pair seen once is no pattern
# What known models call the token that ends a document.
ENDS = (END_OF_TEXT, "<|end_of_text|>", "</s>", "<eos>", "<|im_end|>", "[EOS]", "[SEP]")


class LibraryTokenizer:
    """A tokenizer of the `tokenizers` library. What a text spells stays text: only `end_of_text` ends a document, not its name."""

    def __init__(self, library: tokenizers.Tokenizer) -> None:
        self.library = library
        library.no_padding()
        library.no_truncation()
        library.encode_special_tokens = True
        vocabulary = library.get_vocab(with_added_tokens=True)
        if not vocabulary:
            raise ValueError("its vocabulary is empty")
        # Ids may have holes, and a model has a row for each up to the highest.
        self.vocab_size = max(vocabulary.values()) + 1
        self.special = {number: token.content for number, token in library.get_added_tokens_decoder().items() if token.special}
        number_of = {content: number for number, content in self.special.items()}
        self.end_of_text: int | None = next((number_of[name] for name in ENDS if name in number_of), None)
        self._cuts = Cuts(json.loads(library.to_str()), library)

    @classmethod
    def load(cls, path: Path) -> LibraryTokenizer:
        """The tokenizer of the library's tokenizer.json `path`. Raises OSError, ValueError, UsageError (no library)."""
        return cls.of_json(path.read_text(encoding="utf-8"), str(path))

    @classmethod
    def of_json(cls, text: str, name: str) -> LibraryTokenizer:
        """The tokenizer that the library's JSON `text`, called `name` in errors, describes. Raises ValueError, UsageError (no library)."""
        library = demand_library()
        try:
            return cls(library.Tokenizer.from_str(text))
        except Exception as problem:  # the library raises Exception itself
            raise ValueError(f"{name} is not a readable tokenizer: {problem}") from problem

    def encode(self, text: str) -> Ids:
        utf8(text)
        encoded = self.library.encode_batch_fast(list(self.pieces((text,), PIECE)), add_special_tokens=False)
        return np.fromiter((number for piece in encoded for number in piece.ids), dtype=np.int64)

    def decode(self, ids: Sequence[int] | Tensor | Ids) -> str:
        text: str = self.library.decode(checked(ids, self.vocab_size), skip_special_tokens=False)
        return text

    def pieces(self, chunks: Iterable[str], size: int = CHUNK) -> Iterator[str]:
        """The text of `chunks` in pieces of about `size` characters whose ids one after another are those of the whole text.

        Where to cut is told in cuts.py; all in one piece where the tokenizer is not known to allow a cut.
        """
        return self._cuts.pieces(chunks, size)

    def save(self, path: Path) -> None:
        self.library.save(str(path), pretty=True)


def train_bpe(texts: Iterable[str], vocab_size: int, *, special: Sequence[str] = (END_OF_TEXT,)) -> LibraryTokenizer:
    """A byte-level BPE tokenizer of at most `vocab_size` ids: `special` first, the 256 bytes, then merges of what comes most often.

    `texts`: one text, however it is cut; the same text gives the same tokenizer. Fewer ids where the text has too few pairs to merge.
    Raises ValueError where `vocab_size` has no room for the bytes or there is no text, UsageError where the library is missing.
    """
    least = BYTES + len(special)
    if vocab_size < least:
        raise ValueError(f"vocab_size is {vocab_size}; it must be at least {least}: {BYTES} bytes and {len(special)} special tokens")
    if END_OF_TEXT not in special:
        raise ValueError(f"special is {tuple(special)}; it must hold {END_OF_TEXT}, which separates documents")
    library = demand_library()
    made = library.Tokenizer(library.models.BPE())
    made.pre_tokenizer = library.pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.post_processor = library.processors.ByteLevel(trim_offsets=False)
    made.decoder = library.decoders.ByteLevel()
    trainer = library.trainers.BpeTrainer(
        vocab_size=vocab_size,
        min_frequency=LEAST_COUNT,
        special_tokens=list(special),
        initial_alphabet=library.pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    made.train_from_iterator(_some(Cuts(json.loads(made.to_str()), made).pieces(texts, PIECE)), trainer)
    return LibraryTokenizer(made)


def demand_library() -> ModuleType:
    """The `tokenizers` library. Raises UsageError naming the extra where it is not installed."""
    try:
        import tokenizers
    except ImportError:
        raise UsageError("this needs the tokenizers library: pip install 'sickbay[bpe]'") from None
    return tokenizers


def _some(pieces: Iterator[str]) -> Iterator[str]:
    """`pieces`, at least one."""
    empty = True
    for piece in pieces:
        empty = False
        utf8(piece)
        yield piece
    if empty:
        raise ValueError("there is no text to make a vocabulary of")
