"""Text comes out as it is written: whole characters, nothing of a stop string, the same wherever tokens begin and end."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from test_reference_generate import transformer

from sickbay.reference.generation.beam import Beams
from sickbay.reference.generation.complete import complete, search, write
from sickbay.reference.generation.decoding import Decoding
from sickbay.reference.generation.stream import MOST_BYTES, TextStream
from sickbay.reference.text.bpe import train_bpe
from sickbay.reference.text.tokenizer import ByteTokenizer, CharTokenizer

TEXTS = st.text(st.characters(codec="utf-8", exclude_characters="\N{REPLACEMENT CHARACTER}"), max_size=12)
BYTES = ByteTokenizer()


class Chunks:
    """Bytes, several a token: token n is the n-th piece of a text cut anywhere, also within a character."""

    end_of_text = None

    def __init__(self, pieces: Sequence[bytes]) -> None:
        self.pieces = pieces

    def decode(self, ids: Sequence[int]) -> str:
        return b"".join(self.pieces[number] for number in ids).decode("utf-8", errors="replace")


class ByteFallback(Chunks):
    """As tokenizers with a byte fallback decode: a run of bytes that is not whole characters is one mark a byte."""

    def decode(self, ids: Sequence[int]) -> str:
        whole = b"".join(self.pieces[number] for number in ids)
        try:
            return whole.decode()
        except UnicodeDecodeError:
            return "\N{REPLACEMENT CHARACTER}" * len(whole)


def streamed(tokenizer: object, ids: Sequence[int], stop: Sequence[str] = ()) -> tuple[list[str], bool]:
    stream = TextStream(tokenizer, (), stop)  # type: ignore[arg-type]
    pieces = [stream.add(number) for number in ids]
    return [*pieces, stream.finish()], stream.stopped


def first_complete(text: str, stops: Sequence[str]) -> str:
    """The text before the stop string that is complete first, found one character at a time."""
    for end in range(len(text) + 1):
        ended = [stop for stop in stops if text[:end].endswith(stop)]
        if ended:
            return text[: end - max(len(stop) for stop in ended)]
    return text


@given(TEXTS, st.lists(st.integers(1, 5), max_size=60))
@settings(deadline=None)
def test_all_of_the_text_comes_out_and_no_character_in_parts(text: str, lengths: list[int]) -> None:
    left, pieces = text.encode(), []
    for length in [*lengths, *[7] * 20]:
        pieces.append(left[:length])
        left = left[length:]
    found, _ = streamed(Chunks(pieces), range(len(pieces)))
    assert "".join(found) == text
    assert not any("\N{REPLACEMENT CHARACTER}" in piece for piece in found)


@given(TEXTS)
@settings(deadline=None)
def test_a_byte_fallback_gives_whole_characters_too(text: str) -> None:
    pieces = [bytes((byte,)) for byte in text.encode()]
    found, _ = streamed(ByteFallback(pieces), range(len(pieces)))
    assert "".join(found) == text


@given(st.binary(max_size=40))
@settings(deadline=None)
def test_bytes_that_are_no_text_are_shown_as_the_tokenizer_shows_them_and_not_held_back_for_long(noise: bytes) -> None:
    found, _ = streamed(BYTES, list(noise))
    assert "".join(found) == BYTES.decode(list(noise))
    given = 0
    for number, piece in enumerate(found[:-1], start=1):
        given += len(piece)
        assert len(BYTES.decode(list(noise[:number]))) - given <= MOST_BYTES


@given(st.text("abc", max_size=14), st.lists(st.text("abc", min_size=1, max_size=4), max_size=3), st.lists(st.integers(1, 4), max_size=14))
@settings(deadline=None, max_examples=300)
def test_a_stop_string_ends_the_text_before_it_wherever_tokens_end_and_no_part_of_it_is_shown(
    text: str, stops: list[str], lengths: list[int]
) -> None:
    pieces, left = [], text
    for length in [*lengths, *[3] * 5]:
        pieces.append(left[:length].encode())
        left = left[length:]
    found, stopped = streamed(Chunks(pieces), range(len(pieces)), stops)
    expected = first_complete(text, stops)
    assert "".join(found) == expected
    assert stopped == any(stop in text for stop in stops)
    shown = ""
    for piece in found:
        shown += piece
        assert expected.startswith(shown)


def test_an_empty_stop_string_is_refused() -> None:
    with pytest.raises(ValueError, match="at least one character"):
        TextStream(BYTES, (), [""])


def test_a_byte_level_tokenizers_characters_come_whole() -> None:
    text = "naïve café, 日本語 and 🙂🙃 go on"
    tokenizer = train_bpe([text.encode("ascii", errors="ignore").decode()] * 20, 270)
    ids = tokenizer.encode(text).tolist()
    assert len(ids) > len(text)  # several tokens for one character
    found, _ = streamed(tokenizer, ids)
    assert "".join(found) == text


CHARACTERS = CharTokenizer("abcdefghij\n")


def test_each_text_of_a_batch_ends_for_its_own_reason_and_is_what_it_is_alone() -> None:
    model = transformer()
    prompts, decoding = ["abc", "j", "defghabcdefghij"], Decoding(temperature=1.0)
    together = complete(model, CHARACTERS, prompts, 40, decoding, seed=5, stop=["a"])
    for row, text in enumerate(together):
        alone = complete(model, CHARACTERS, [prompts[row]], 40, decoding, seed=5 + row, stop=["a"])[0]
        assert text == alone
        assert "a" not in text.text
        assert text.ended == ("length" if len(text.text) == 40 else "stop")


def test_generation_ends_when_every_row_has() -> None:
    model = transformer()
    calls: list[int] = []
    model.head.register_forward_hook(lambda *_: calls.append(1))
    texts = complete(model, CHARACTERS, ["abc", "bcd"], 500, Decoding(temperature=1.0), stop=list("abcdef"))
    assert len(calls) == max(text.tokens for text in texts) < 500


def test_the_end_of_a_text_ends_it_and_is_not_shown() -> None:
    model = transformer(vocab_size=257, context=32)
    with torch.no_grad():
        model.head.weight = torch.nn.Parameter(model.head.weight.clone())
        model.head.weight[256] = 100 * model.final_norm(model.hidden(torch.tensor([[97]])))[0, 0]
    text = complete(model, BYTES, ["a"], 50, Decoding(temperature=0))[0]
    assert (text.text, text.tokens, text.ended) == ("", 1, "end-of-text")
    assert complete(model, BYTES, [""], 1, Decoding(temperature=0))[0].tokens == 1  # begins after the end of a text
    with pytest.raises(ValueError, match="prompt is empty"):
        complete(transformer(), CHARACTERS, [""], 5, Decoding())


def test_a_search_gives_texts() -> None:
    texts = search(transformer(), CHARACTERS, ["abc", "j"], 6, Beams(width=3))
    assert [[len(text.text) for text in found] for found in texts] == [[6] * 3, [6] * 3]
    assert texts[0][0].prompt == "abc"


def test_the_last_piece_of_a_text_says_why_it_ended() -> None:
    pieces = list(write(transformer(), CHARACTERS, ["abc"], 5, Decoding(temperature=1.0)))
    assert [piece.ended for piece in pieces] == [None] * 4 + ["length"]
    assert [piece.tokens for piece in pieces] == [1, 2, 3, 4, 5]
