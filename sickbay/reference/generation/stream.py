"""From tokens to text while they are written: whole characters only, and nothing of a stop string."""

from __future__ import annotations

from collections.abc import Sequence

from sickbay.reference.text.tokenizer import Tokenizer

UNFINISHED = "\N{REPLACEMENT CHARACTER}"  # what tokenizers decode a character's first bytes to while its last are missing
MOST_BYTES = 4  # of one character in UTF-8


class TextStream:
    """The text of one row's tokens, given out as far as nothing that may follow can change it.

    The text ends before the stop string that is complete first (of several complete at once, the longest): where the tokens' borders
    lie makes no difference. `before`: ids in front, which some tokenizers' first word depends on; their text is not given.
    """

    def __init__(self, tokenizer: Tokenizer, before: Sequence[int] = (), stop: Sequence[str] = ()) -> None:
        if "" in stop:
            raise ValueError("a stop string must have at least one character")
        self._tokenizer, self._stop = tokenizer, stop
        self._ids = list(before)[-MOST_BYTES:]
        self._start, self._read = 0, len(self._ids)  # decoded from _start on; up to _read every character is whole
        self._given = len(tokenizer.decode(self._ids))
        self._waiting = ""  # whole characters that may be the beginning of a stop string
        self.stopped = False

    def add(self, token: int) -> str:
        """The text that is certain now and was not before; "" once `stopped`."""
        self._ids.append(token)
        text = self._tokenizer.decode(self._ids[self._start :])
        open_end = len(text) - len(text.rstrip(UNFINISHED))
        piece = ""
        if open_end == 0:
            piece = text[self._given :]
            # The last tokens stay in front of the next: a tokenizer may decode a first word differently.
            self._start, self._read = self._read, len(self._ids)
            self._given = len(self._tokenizer.decode(self._ids[self._start :]))
        elif len(self._ids) - self._read >= MOST_BYTES:
            # Longer than any character: bytes that are none stand before the open end.
            piece = text[self._given : len(text) - min(open_end, MOST_BYTES - 1)]
            self._given += len(piece)
        return self._until_stop(piece)

    def finish(self) -> str:
        """The text held back until now: no more tokens come."""
        rest = self._until_stop(self._tokenizer.decode(self._ids[self._start :])[self._given :])
        rest, self._waiting = rest + self._waiting, ""
        return rest

    def _until_stop(self, piece: str) -> str:
        if self.stopped:
            return ""
        text = self._waiting + piece
        ends = [(text.index(stop) + len(stop), -len(stop)) for stop in self._stop if stop in text]
        if ends:
            end, less = min(ends)
            self.stopped, self._waiting = True, ""
            return text[: end + less]
        kept = max((_begun(text, stop) for stop in self._stop), default=0)
        self._waiting = text[len(text) - kept :]
        return text[: len(text) - kept]


def _begun(text: str, stop: str) -> int:
    """How many characters at the end of `text` may be the beginning of `stop`."""
    return next((length for length in range(min(len(stop) - 1, len(text)), 0, -1) if text.endswith(stop[:length])), 0)
