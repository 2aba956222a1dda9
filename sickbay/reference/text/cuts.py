"""Where a text may be cut so that the ids of its pieces, one after another, are those of the whole text.

Between a letter or digit and the white space after it, where the tokenizer's own parts are seen to part the two and none of them looks
back over the cut. Text written without spaces is cut where the pre-tokenizer ends a word. A tokenizer of which this is not known
is given its text in one piece.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import tokenizers

SPACES = " \n\r\t"
LETTERS = "aZ1éß中ा"  # what is tried before each space: cases, digits, one to three bytes, a mark
SPACE_MARK = "▁"  # what stands for a space in vocabularies of SentencePiece (Kudo & Richardson 2018)
# Parts of a tokenizer.json that act on each character or word alone, whatever stands before it.
FORWARD = {
    *("ByteLevel", "Metaspace", "Split", "Digits", "Whitespace", "WhitespaceSplit", "Punctuation", "BertPreTokenizer"),
    *("NFC", "NFD", "NFKC", "NFKD", "Lowercase", "StripAccents", "BertNormalizer", "Prepend", "Replace"),
}
LOOKS_BACK = re.compile(r"\(\?<[=!]|\\[AGK]|(?<![\[\\])\^")


class Cuts:
    """The places for the tokenizer whose JSON is `held`. `anywhere`: False = a text must stay in one piece."""

    def __init__(self, held: dict[str, Any], library: tokenizers.Tokenizer) -> None:
        normalizers = _flat(held["normalizer"], "normalizers")
        splitters = _flat(held["pre_tokenizer"], "pretokenizers")
        self._pre_tokenizer = library.pre_tokenizer
        # A prefix that every text gets stands for the space before its first word: at a cut that space is left out instead.
        self._left_out = 1 if any(part["type"] == "Prepend" for part in normalizers) else 0
        self._spaces = ""
        self._between_words = False
        if all(_forward(part) for part in (*normalizers, *splitters)) and not any(_crosses(token) for token in held["added_tokens"]):
            marks = {part["type"] for part in splitters} <= {"Metaspace"} and "vocab" in held["model"]
            replaced = any(part["type"] in ("Replace", "Prepend") for part in normalizers)
            if not replaced:
                prefixed = any(part.get("add_prefix_space") for part in splitters)
                self._spaces = "".join(space for space in (" " if prefixed else SPACES) if _parts(library.pre_tokenizer, space))
                self._between_words = bool(self._spaces) and not normalizers and not prefixed
            if not self._spaces and marks and _marks_begin_tokens(held["model"]):
                self._spaces = " "

    @property
    def anywhere(self) -> bool:
        return bool(self._spaces)

    def pieces(self, chunks: Iterable[str], size: int) -> Iterator[str]:
        """The text of `chunks` in pieces of about `size` characters."""
        held = ""
        for chunk in chunks:
            for begin in range(0, len(chunk), size):
                held += chunk[begin : begin + size]
                if len(held) >= size and (cut := self._last(held, size)):
                    yield held[:cut]
                    held = held[cut + self._left_out :]
        if held:
            yield held

    def _last(self, text: str, size: int) -> int:
        """The last place in the last `size` characters of `text`, 0 = none."""
        if not self._spaces:
            return 0
        for place in range(len(text) - 2, max(0, len(text) - size - 1), -1):
            if text[place] in self._spaces and text[place - 1].isalnum():
                return place
        return self._word_end(text) if self._between_words else 0

    def _word_end(self, text: str) -> int:
        """The end of the pre-tokenizer's last word but a few that is a word's end also when nothing follows, 0 = none."""
        words = [span for _, span in self._pre_tokenizer.pre_tokenize_str(text)]
        for number in range(len(words) - 3, max(0, len(words) - 100), -1):
            end = int(words[number - 1][1])
            # Digits may be grouped from the right and white space by what follows: both may change with what is cut off.
            if text[end - 1].isalpha() or not (text[end - 1].isspace() or text[end - 1].isnumeric()):
                head, tail = (self._pre_tokenizer.pre_tokenize_str(part) for part in (text[:end], text[end:]))
                if [span for _, span in head] + [(first + end, last + end) for _, (first, last) in tail] == words:
                    return end
        return 0


def _flat(part: dict[str, Any] | None, members: str) -> list[dict[str, Any]]:
    """The parts that a sequence of sequences holds."""
    if part is None:
        return []
    return [inner for member in part[members] for inner in _flat(member, members)] if part["type"] == "Sequence" else [part]


def _forward(part: dict[str, Any]) -> bool:
    """True where the part treats a text after a cut as it would before it."""
    pattern = part.get("pattern") or {}
    if part["type"] == "Replace":
        return len(pattern.get("String", "")) == 1
    return part["type"] in FORWARD and not LOOKS_BACK.search(pattern.get("Regex", ""))


def _crosses(token: dict[str, Any]) -> bool:
    """True where an added token may take in the space that a cut would part from it."""
    return not token["special"] and bool(token["rstrip"] or re.search(r"\S\s", token["content"]))


def _parts(pre_tokenizer: Any, space: str) -> bool:
    """True where the pre-tokenizer parts every kind of letter from `space` behind it."""
    if pre_tokenizer is None:
        return False
    return all(any(end == 2 for _, (_, end) in pre_tokenizer.pre_tokenize_str(f"x{letter}{space}y")) for letter in LETTERS)


def _marks_begin_tokens(model: dict[str, Any]) -> bool:
    """True where no token holds the mark of a space behind another character: what is merged, or chosen, then never crosses a space."""
    tokens = model["vocab"] if isinstance(model["vocab"], dict) else [token for token, _ in model["vocab"]]
    inside = re.compile(f"[^{SPACE_MARK}]{SPACE_MARK}")
    return model["type"] in ("BPE", "Unigram") and SPACE_MARK in tokens and not any(inside.search(token) for token in tokens)
