"""Tokenizers: what is encoded decodes, pieces have the ids of the whole, and every kind of tokenizer.json loads."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tokenizers
from hypothesis import given, settings
from hypothesis import strategies as st

from sickbay.core.errors import UsageError
from sickbay.reference.text import tokenizer as kinds
from sickbay.reference.text.bpe import LibraryTokenizer, train_bpe
from sickbay.reference.text.tokenizer import ByteTokenizer, CharTokenizer
from tests.known_tokenizers import OTHER, TEXT, bert, gpt2, llama2, llama3, unigram

WORDS = [
    "the",
    "king",
    "'s",
    "it's",
    " ",
    "  ",
    "\n",
    "\r\n",
    "\t",
    "1234567",
    "é",
    "e\u0301",
    "😀",
    "👍🏽",
    "数据",
    "。",
    "!",
    ";\n",
    "▁",
    "Ġ",
    "\u3000",
]

texts = st.lists(st.sampled_from(WORDS) | st.text(st.characters(exclude_categories=("Cs",)), max_size=3), max_size=30).map("".join)


@pytest.fixture(scope="module", params=[gpt2, llama3, llama2, unigram, bert], ids=lambda make: make.__name__)
def library(request: pytest.FixtureRequest) -> LibraryTokenizer:
    make: Callable[[], tokenizers.Tokenizer] = request.param
    return LibraryTokenizer(make())


@pytest.fixture(scope="module")
def bpe() -> LibraryTokenizer:
    return LibraryTokenizer(gpt2())


@settings(deadline=None, max_examples=300)
@given(text=texts, size=st.integers(1, 12), chunk=st.integers(1, 9))
def test_pieces_have_the_ids_of_the_whole_text(library: LibraryTokenizer, text: str, size: int, chunk: int) -> None:
    chunks = [text[begin : begin + chunk] for begin in range(0, len(text), chunk)]
    whole = library.library.encode(text, add_special_tokens=False).ids
    assert [number for piece in library.pieces(chunks, size) for number in library.encode(piece)] == whole


def test_a_text_is_cut_often_enough_to_be_read_in_bounded_memory(library: LibraryTokenizer) -> None:
    longest = max(map(len, library.pieces([TEXT], 100)))
    assert longest < 300
    whole = library.library.encode(TEXT, add_special_tokens=False).ids
    assert [number for piece in library.pieces([TEXT], 100) for number in library.encode(piece)] == whole


def test_a_text_without_spaces_is_cut_where_words_end(bpe: LibraryTokenizer) -> None:
    text = "模型在学习。数据很多,一二三「四」1234567。" * 40
    pieces = list(bpe.pieces([text], 100))
    assert max(map(len, pieces)) < 250
    assert [number for piece in pieces for number in bpe.encode(piece)] == bpe.library.encode(text, add_special_tokens=False).ids


@pytest.mark.parametrize(
    "change",
    [
        {"normalizer": {"type": "Strip", "strip_left": True, "strip_right": True}},
        {"pre_tokenizer": {"type": "Split", "pattern": {"Regex": r"(?<= )\w+"}, "behavior": "Isolated", "invert": False}},
        {"pre_tokenizer": None},
    ],
    ids=["normalizer strips", "pattern looks back", "no word ends at a space"],
)
def test_a_tokenizer_that_may_look_over_a_cut_gets_its_text_whole(bpe: LibraryTokenizer, change: dict[str, Any]) -> None:
    held = {**json.loads(bpe.library.to_str()), **change}
    assert list(LibraryTokenizer.of_json(json.dumps(held), "it").pieces(["one two ", "three four"], 4)) == ["one two three four"]


@settings(deadline=None, max_examples=300)
@given(text=texts)
def test_what_bytes_and_bpe_encode_decodes(bpe: LibraryTokenizer, text: str) -> None:
    for tokenizer in (ByteTokenizer(), bpe):
        ids = tokenizer.encode(text)
        assert ids.dtype == np.int64
        assert tokenizer.decode(ids) == text
        assert tokenizer.end_of_text not in ids
        assert ((ids >= 0) & (ids < tokenizer.vocab_size)).all()


@pytest.mark.parametrize("text", ["<|endoftext|>", "one<|endoftext|>two <|endoftext|>"])
def test_the_name_of_the_end_is_text_and_its_id_is_the_end(bpe: LibraryTokenizer, text: str) -> None:
    for tokenizer in (ByteTokenizer(), bpe):
        assert tokenizer.end_of_text not in tokenizer.encode(text)
        assert tokenizer.decode(tokenizer.encode(text)) == text
        assert tokenizer.decode([tokenizer.end_of_text]) == "<|endoftext|>"


@pytest.mark.parametrize("make", [lambda: CharTokenizer("abc 数"), ByteTokenizer, lambda: LibraryTokenizer(gpt2())])
def test_a_saved_tokenizer_loads_as_it_was(tmp_path: Path, make: Callable[[], kinds.Tokenizer]) -> None:
    tokenizer = make()
    tokenizer.save(tmp_path / "tokenizer.json")
    for place in (tmp_path, tmp_path / "tokenizer.json"):
        loaded = kinds.load(place)
        assert type(loaded) is type(tokenizer)
        assert (loaded.vocab_size, loaded.end_of_text) == (tokenizer.vocab_size, tokenizer.end_of_text)
        assert loaded.encode("ab 数c").tolist() == tokenizer.encode("ab 数c").tolist()


def test_ends_of_known_models_are_known(library: LibraryTokenizer) -> None:
    assert library.end_of_text is not None
    assert library.special[library.end_of_text] in ("<|endoftext|>", "<|end_of_text|>", "</s>", "[SEP]")


def test_transformers_reads_what_is_saved(tmp_path: Path, bpe: LibraryTokenizer) -> None:
    from transformers import PreTrainedTokenizerFast

    bpe.save(tmp_path / "tokenizer.json")
    theirs = PreTrainedTokenizerFast(tokenizer_file=str(tmp_path / "tokenizer.json"))
    assert theirs(OTHER)["input_ids"] == bpe.encode(OTHER).tolist()


def test_padding_and_truncation_of_a_file_do_not_touch_a_text(tmp_path: Path, bpe: LibraryTokenizer) -> None:
    made = tokenizers.Tokenizer.from_str(bpe.library.to_str())
    made.enable_truncation(3)
    made.enable_padding(length=9)
    made.save(str(tmp_path / "tokenizer.json"))
    loaded = kinds.load(tmp_path)
    assert loaded.encode(OTHER).tolist() == bpe.encode(OTHER).tolist()


@settings(deadline=None, max_examples=20)
@given(chunk=st.integers(1, 500))
def test_training_depends_on_the_text_alone_not_on_its_chunks(bpe: LibraryTokenizer, chunk: int) -> None:
    again = train_bpe((TEXT[begin : begin + chunk] for begin in range(0, len(TEXT), chunk)), 400)
    assert again.library.to_str() == bpe.library.to_str()


def test_a_trained_vocabulary_is_special_tokens_bytes_and_merges() -> None:
    made = train_bpe([TEXT], 300, special=("<|endoftext|>", "<|pad|>"))
    assert made.special == {0: "<|endoftext|>", 1: "<|pad|>"}
    assert made.vocab_size == 300
    assert len(json.loads(made.library.to_str())["model"]["merges"]) == 300 - 256 - 2
    assert train_bpe(["abab"], 5000).vocab_size == 258, "one pair comes twice, so there is one merge"


def test_more_merges_make_shorter_texts() -> None:
    lengths = [len(train_bpe([TEXT], size).encode(TEXT)) for size in (257, 300, 400, 600)]
    assert lengths[0] == len(TEXT.encode())
    assert lengths == sorted(set(lengths), reverse=True)


@pytest.mark.parametrize(
    ("build", "words"),
    [
        (lambda: train_bpe([TEXT], 256), r"vocab_size is 256; it must be at least 257"),
        (lambda: train_bpe([TEXT], 300, special=()), r"it must hold <\|endoftext\|>"),
        (lambda: train_bpe([], 300), "no text"),
        (lambda: train_bpe(["\ud800"], 300), "half a surrogate pair"),
        (lambda: ByteTokenizer().encode("a\ud800"), "character 1 of the text .* half a surrogate pair"),
        (lambda: ByteTokenizer().decode([-1]), "must not be negative; the least is -1"),
        (lambda: CharTokenizer("ab").encode("abc"), "'c' .character 2. is not among the tokenizer's 2"),
        (lambda: CharTokenizer.of_texts([]), "at least one"),
    ],
)
def test_what_cannot_be_is_refused_with_its_range(build: Callable[[], object], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        build()


def test_an_id_beyond_the_vocabulary_is_refused(bpe: LibraryTokenizer) -> None:
    for tokenizer in (ByteTokenizer(), CharTokenizer("ab"), bpe):
        with pytest.raises(IndexError, match=f"ids go from 0 to {tokenizer.vocab_size - 1}"):
            tokenizer.decode([tokenizer.vocab_size])


@pytest.mark.parametrize("held", ["", "[]", "{}", '{"kind": "signs"}', '{"kind": "characters"}', '{"model": {"type": "BPE"}}', '"x"'])
def test_a_damaged_tokenizer_is_refused_with_its_path(tmp_path: Path, held: str) -> None:
    (tmp_path / "tokenizer.json").write_text(held)
    with pytest.raises(ValueError, match=r"tokenizer\.json is not a readable tokenizer"):
        kinds.load(tmp_path)


def test_a_missing_library_is_told_with_the_way_out(tmp_path: Path, bpe: LibraryTokenizer, monkeypatch: pytest.MonkeyPatch) -> None:
    bpe.save(tmp_path / "tokenizer.json")
    monkeypatch.setitem(sys.modules, "tokenizers", None)
    with pytest.raises(UsageError, match=r"pip install 'sickbay\[bpe\]'"):
        kinds.load(tmp_path)
