"""From texts to tokens on disk: every kind of source, split by documents, found again, bounded in memory."""

from __future__ import annotations

import io
import itertools
import json
import subprocess
import sys
from array import array
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sickbay.core.errors import UsageError
from sickbay.reference import data
from sickbay.reference.data import DataSettings, sources
from sickbay.reference.data import corpus as corpus_module
from sickbay.reference.data.sources import Text
from sickbay.reference.data.tokens import Written, bytes_within, move, validation_spans
from sickbay.reference.text.tokenizer import ByteTokenizer

BYTES = DataSettings(tokenizer="bytes")
END = ByteTokenizer.end_of_text


def rows(path: Path, texts: Sequence[str], field: str = "text") -> Path:
    path.write_text("".join(json.dumps({field: text}) + "\n" for text in texts), encoding="utf-8")
    return path


def decoded(corpus: data.Corpus, tokens: data.Tokens) -> list[bytes]:
    """The documents of a byte corpus."""
    ends = np.flatnonzero(np.asarray(tokens) == END)
    parts = np.split(np.asarray(tokens), ends + 1)
    return [bytes(part[part != END].astype(np.uint8).tolist()) for part in parts if len(part)]


def test_tokens_are_mapped_from_the_file_and_decode_to_the_text(tmp_path: Path) -> None:
    text = tmp_path / "text.txt"
    text.write_bytes("thé quick\r\nbrown 日本 fox\n".encode() * 50)
    corpus = data.prepare(text, tmp_path / "tokens")
    assert isinstance(corpus.train, np.memmap) and isinstance(corpus.val, np.memmap)
    both = np.concatenate((corpus.train, corpus.val))
    assert corpus.tokenizer.decode(both).encode() == text.read_bytes()
    assert len(corpus.train) == len(both) * 9 // 10
    assert corpus.bytes_per_token == pytest.approx(text.stat().st_size / len(both))
    assert corpus.source == data.fingerprint(text)


def test_a_text_read_in_pieces_gives_the_same_tokens(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    text = tmp_path / "text.txt"
    text.write_text("日本語 and english 🎈\r\n" * 40, encoding="utf-8")
    whole = data.prepare(text, tmp_path / "whole")
    for chunk in (1, 2, 3, 7, 64):
        monkeypatch.setattr(sources, "CHUNK", chunk)
        pieces = data.prepare(text, tmp_path / f"pieces{chunk}")
        assert pieces.train.tolist() == whole.train.tolist()
        assert pieces.val.tolist() == whole.val.tolist()


def test_a_folder_is_its_texts_by_name_each_ended(tmp_path: Path) -> None:
    folder = tmp_path / "texts"
    (folder / "deep").mkdir(parents=True)
    (folder / ".hidden").mkdir()
    for name, text in (
        ("b.txt", "bee"),
        ("a.md", "ay"),
        ("deep/c.txt", "sea"),
        ("empty.txt", ""),
        (".hidden/d.txt", "no"),
        ("x.bin", "no"),
    ):
        (folder / name).write_text(text)
    rows(folder / "rows.jsonl", ["one", "two\nlines", "", "three"])
    corpus = data.prepare(folder, tmp_path / "tokens", DataSettings(tokenizer="bytes", val_share=0.01))
    everything = decoded(corpus, np.concatenate((corpus.train, corpus.val)))
    assert everything == [b"ay", b"bee", b"sea", b"one", b"two\nlines", b"three"]
    assert corpus.several


def test_a_single_text_is_not_ended_and_a_row_of_jsonl_is(tmp_path: Path) -> None:
    (tmp_path / "text.txt").write_text("a text of its own")
    single = data.prepare(tmp_path / "text.txt", tmp_path / "tokens", BYTES)
    assert END not in single.train and END not in single.val and not single.several
    row = data.prepare(rows(tmp_path / "row.jsonl", ["a text of its own"]), tmp_path / "tokens", BYTES)
    assert row.val[-1] == END and row.several


def test_characters_have_a_line_end_between_documents(tmp_path: Path) -> None:
    path = rows(tmp_path / "rows.jsonl", ["abc"] * 20)
    corpus = data.prepare(path, tmp_path / "tokens")
    assert corpus.tokenizer.decode(np.concatenate((corpus.train, corpus.val))) == "abc\n" * 20


def test_stdin_is_read_once_and_is_the_same_text_as_the_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    held = "from a pipe: é\n".encode() * 30
    (tmp_path / "file.txt").write_bytes(held)
    file = data.prepare(tmp_path / "file.txt", tmp_path / "tokens", BYTES)
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(held)))
    piped = data.prepare(Path("-"), tmp_path / "piped", BYTES)
    assert piped.source == file.source
    assert piped.train.tolist() == file.train.tolist()
    assert not [path for path in (tmp_path / "piped").rglob("*") if "stdin" in path.name or "partial" in path.name]

    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(b"")))
    resumed = data.prepare(Path("-"), tmp_path / "piped", BYTES, piped.tokenizer, expected=piped.source)
    assert resumed.train.tolist() == file.train.tolist(), "a run goes on although the pipe has run dry"
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(b"caf\xe9")))
    with pytest.raises(UsageError, match=r"^stdin is not UTF-8 text \(byte 3\)"):
        data.prepare(Path("-"), tmp_path / "piped", BYTES)


def test_a_second_run_encodes_nothing_and_a_changed_text_does(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    text = tmp_path / "text.txt"
    text.write_text("the same text again and again\n" * 20)
    first = data.prepare(text, tmp_path / "tokens")
    written = corpus_module.tokens.write_tokens

    def refuses(*_: Any) -> None:
        raise AssertionError("encoded again")

    monkeypatch.setattr(corpus_module.tokens, "write_tokens", refuses)
    monkeypatch.setattr(Text, "chunks", refuses)
    again = data.prepare(text, tmp_path / "tokens")
    assert again.train.tolist() == first.train.tolist() and again.bytes_per_token == first.bytes_per_token
    resumed = data.prepare(text, tmp_path / "tokens", tokenizer=first.tokenizer, expected=first.source)
    assert resumed.val.tolist() == first.val.tolist()
    with pytest.raises(AssertionError, match="encoded again"):
        data.prepare(text, tmp_path / "tokens", DataSettings(val_share=0.2))
    monkeypatch.undo()

    changed, folders = tmp_path / "changed.txt", len(list((tmp_path / "tokens").iterdir()))
    changed.write_text(text.read_text().replace("same", "very"))
    assert data.prepare(changed, tmp_path / "tokens").source != first.source
    assert len(list((tmp_path / "tokens").iterdir())) > folders
    with pytest.raises(UsageError, match=r"changed.txt is not the text this run was trained on"):
        data.prepare(changed, tmp_path / "tokens", tokenizer=first.tokenizer, expected=first.source)
    assert written is corpus_module.tokens.write_tokens


def test_damaged_tokens_are_written_again(tmp_path: Path) -> None:
    text = tmp_path / "text.txt"
    text.write_text("the same text again and again\n" * 20)
    first = data.prepare(text, tmp_path / "tokens", BYTES).train.tolist()
    (train,) = (tmp_path / "tokens").glob("*/train.bin")
    train.write_bytes(train.read_bytes()[:-6])
    assert data.prepare(text, tmp_path / "tokens", BYTES).train.tolist() == first
    (train.parent / "corpus.json").write_text("{")
    assert data.prepare(text, tmp_path / "tokens", BYTES).train.tolist() == first


def test_work_cut_short_leaves_nothing_behind(tmp_path: Path) -> None:
    path = rows(tmp_path / "rows.jsonl", ["fine"] * 5)
    path.write_text(path.read_text() + "{broken\n")
    with pytest.raises(UsageError):
        data.prepare(path, tmp_path / "tokens", BYTES)
    assert not (tmp_path / "tokens").exists()


LENGTHS = st.lists(st.integers(0, 50) | st.integers(0, 5000), min_size=1, max_size=60).filter(any)


@given(lengths=LENGTHS, percent=st.integers(1, 99))
@settings(deadline=None)
def test_validation_is_about_its_share_in_whole_documents_or_the_end(lengths: list[int], percent: int) -> None:
    share, total = percent / 100, sum(lengths)
    spans = validation_spans(array("Q", lengths), share)
    held = sum(end - begin for begin, end in spans)
    assert all(begin <= end for begin, end in spans)
    assert all(before[1] < after[0] for before, after in itertools.pairwise(spans))
    bounds = {0, *np.cumsum(lengths).tolist()}
    whole = all(begin in bounds and end in bounds for begin, end in spans)
    assert whole or (len(spans) == 1 and spans[0][1] == total)
    if not whole:
        assert held == total - total * (100 - percent) // 100
    # Off by at most half of the largest document that may be drawn, or all that there are hold less.
    wanted = share * total
    small = [length for length in lengths if length <= wanted]
    assert abs(held - wanted) <= max([1, *(length / 2 for length in small)]) or (whole and held == sum(small) >= wanted / 2)


@given(lengths=LENGTHS, percent=st.integers(1, 99))
@settings(deadline=None, max_examples=40)
def test_moving_leaves_every_token_once_and_in_order(tmp_path_factory: pytest.TempPathFactory, lengths: list[int], percent: int) -> None:
    folder = tmp_path_factory.mktemp("move")
    tokens = np.arange(sum(lengths)) % 60_000
    (folder / "all").write_bytes(tokens.astype("<u2").tobytes())
    spans = validation_spans(array("Q", lengths), percent / 100)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("sickbay.reference.data.tokens.CHUNK", 46)
        move(folder / "all", spans, folder / "val", 257)
    taken = np.zeros(len(tokens), dtype=bool)
    for begin, end in spans:
        taken[begin:end] = True
    assert np.fromfile(folder / "val", dtype="<u2").tolist() == tokens[taken].tolist()
    assert np.fromfile(folder / "all", dtype="<u2").tolist() == tokens[~taken].tolist()


def test_bytes_are_counted_by_documents_and_of_a_cut_one_in_proportion() -> None:
    written = Written(array("Q", [4, 0, 10, 6]), array("Q", [8, 0, 30, 6]))
    assert bytes_within(written, [(0, 4)]) == 8
    assert bytes_within(written, [(4, 14)]) == 30
    assert bytes_within(written, [(0, 4), (14, 20)]) == 14
    assert bytes_within(written, [(9, 20)]) == 15 + 6


def test_documents_are_split_whole_by_a_shuffle_and_bytes_per_token_are_validations_own(tmp_path: Path) -> None:
    texts = [f"document {number} " + "é" * (number % 5) for number in range(200)]
    corpus = data.prepare(rows(tmp_path / "rows.jsonl", texts), tmp_path / "tokens", BYTES)
    train, val = ({text.decode() for text in decoded(corpus, part)} for part in (corpus.train, corpus.val))
    assert train | val == set(texts) and not train & val
    assert 18 <= len(val) <= 22
    numbers = sorted(int(text.split()[1]) for text in val)
    assert numbers[0] < 60 and numbers[-1] > 140, "not one end of the texts"
    size = sum(len(text.encode()) for text in val)
    assert corpus.bytes_per_token == pytest.approx(size / (size + len(val)))


def test_a_text_for_validation_alone_leaves_the_other_whole(tmp_path: Path) -> None:
    (tmp_path / "train.txt").write_text("what is trained on\n" * 30)
    (tmp_path / "val.txt").write_text("something else: ü\n" * 10)
    chosen = DataSettings(val=str(tmp_path / "val.txt"))
    corpus = data.prepare(tmp_path / "train.txt", tmp_path / "tokens", chosen)
    assert corpus.tokenizer.decode(corpus.train) == (tmp_path / "train.txt").read_text()
    assert corpus.tokenizer.decode(corpus.val) == (tmp_path / "val.txt").read_text()
    assert corpus.bytes_per_token == pytest.approx((tmp_path / "val.txt").stat().st_size / len(corpus.val))
    with pytest.raises(UsageError, match="in both the training and the validation text"):
        data.prepare(tmp_path, tmp_path / "tokens", chosen)


@pytest.mark.parametrize(
    ("line", "words"),
    [
        (b'{"text": "open', ["rows.jsonl:3", "not JSON", "one JSON object"]),
        (b"[1, 2]", ["rows.jsonl:3", "list", "not an object"]),
        (b'{"body": "x", "id": 1}', ["rows.jsonl:3", "no field 'text'", "body, id", "--field"]),
        (b'{"text": 7}', ["rows.jsonl:3", "'text' is int"]),
        (b'{"text": null}', ["rows.jsonl:3", "NoneType"]),
        (b'{"text": "caf\xe9"}', ["rows.jsonl:3", "not UTF-8", "byte 13"]),
        (b'{"text": "\\ud83d"}', ["rows.jsonl:3", "surrogate"]),
        (b'{"text": ' + b"[" * 100_000 + b"]" * 100_000 + b"}", ["rows.jsonl:3", "nested too deeply"]),
    ],
)
def test_a_bad_row_is_refused_with_file_and_line(tmp_path: Path, line: bytes, words: list[str]) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_bytes(b'{"text": "fine"}\n\n' + line + b"\n")
    with pytest.raises(UsageError) as refused:
        data.prepare(path, tmp_path / "tokens", BYTES)
    assert all(word in str(refused.value) for word in words), refused.value
    assert "\n" not in str(refused.value)


def test_texts_that_cannot_be_read_are_refused_with_the_place_and_the_way_out(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refusal(place: Path, **changes: Any) -> str:
        context = changes.pop("context", 0)
        with pytest.raises(UsageError) as refused:
            data.prepare(place, tmp_path / "tokens", DataSettings(**{"tokenizer": "bytes", **changes}), context=context)
        return str(refused.value)

    text, latin, cut = tmp_path / "text.txt", tmp_path / "latin.txt", tmp_path / "cut.txt"
    text.write_text("only these letters")
    latin.write_bytes("日".encode() * 700_000 + b"\xff")
    cut.write_bytes("日".encode()[:2])
    (tmp_path / "none").mkdir()
    assert "no text file at" in refusal(tmp_path / "absent.txt")
    assert "holds none that ends in .txt" in refusal(tmp_path / "none")
    assert "latin.txt is not UTF-8 text (byte 2,100,000)" in refusal(latin)
    assert "cut.txt is not UTF-8 text (byte 0)" in refusal(cut)
    assert "has 18 bytes; context=8 needs at least 81" in refusal(text, context=8)
    assert "tokenizer is 'words'; it must be chars, bytes, bpe or the path" in refusal(text, tokenizer="words")
    (tmp_path / "empty.txt").write_text("")
    assert "empty.txt has 0 bytes" in refusal(tmp_path / "empty.txt")
    rows(tmp_path / "blank.jsonl", ["", ""])
    assert "no document with any text" in refusal(tmp_path / "blank.jsonl")
    with pytest.raises(UsageError, match=r"text.txt: 'o' \(character 0\) is not among .*bytes and bpe know every text"):
        data.prepare(text, tmp_path / "tokens", tokenizer=data.CharTokenizer("ab"))
    terminal = io.TextIOWrapper(io.BytesIO())
    monkeypatch.setattr(terminal, "isatty", lambda: True)
    monkeypatch.setattr(sys, "stdin", terminal)
    assert "a terminal; pipe a text into it" in refusal(Path("-"))


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"val_share": 0.0}, ["val_share", "above 0"]),
        ({"val_share": 1.0}, ["val_share", "below 1"]),
        ({"delete_words": -0.1}, ["delete_words", "-0.1", "at least 0"]),
        ({"swap_words": float("nan")}, ["swap_words", "nan"]),
        ({"order": "sorted"}, ["order", "random, shuffled"]),
        ({"bpe_vocab": 256}, ["bpe_vocab", "256", "at least 257"]),
        ({"copies": 0}, ["copies", "at least 1"]),
        ({"translate_there": "a"}, ["translate_back", "each direction"]),
        ({"tokenizer": ""}, ["tokenizer", "not empty"]),
        ({"packed": 1}, ["packed", "True or False"]),
    ],
)
def test_impossible_settings_are_refused_with_field_value_and_range(change: dict[str, Any], words: list[str]) -> None:
    with pytest.raises(ValueError) as refusal:
        DataSettings(**change)
    assert all(word in str(refusal.value) for word in words), refusal.value


ENCODES = """
import re, sys
from pathlib import Path
from sickbay.reference import data
corpus = data.prepare(Path("-"), Path(sys.argv[1]), data.DataSettings(tokenizer="bytes"))
peak = re.search(r"VmHWM:\\s+(\\d+) kB", Path("/proc/self/status").read_text())
print(len(corpus.train) + len(corpus.val), int(peak.group(1)) / 1024)
"""


def peak(folder: Path, mebibytes: int) -> float:
    """The peak memory in MiB of a process that makes tokens of `mebibytes` of text from a pipe; getrusage's would begin at ours."""
    command = [sys.executable, "-c", ENCODES, str(folder)]
    block = (b"A line of text that says nothing much, over and over.\n" * 20_000)[: 1 << 20]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as process:
        assert process.stdin is not None and process.stdout is not None
        for _ in range(mebibytes):
            process.stdin.write(block)
        process.stdin.close()
        tokens, memory = process.stdout.read().split()
    assert int(tokens) == mebibytes << 20
    return float(memory)


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="the peak of one process alone is told by Linux only")
def test_memory_does_not_grow_with_the_text(tmp_path: Path) -> None:
    small, large = peak(tmp_path / "small", mebibytes=10), peak(tmp_path / "large", mebibytes=100)
    assert large < small + 20, f"{small:.0f} MiB for 10 MiB of text, {large:.0f} MiB for 100"
