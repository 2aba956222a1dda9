"""Altered copies of the training text: what is altered, that it repeats by its seed, and that validation stays out of it."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from sickbay.core.errors import UsageError
from sickbay.reference import data
from sickbay.reference.data import DataSettings, augment
from sickbay.reference.data.augment import Augmentation, back_translated, delete_words, swap_words
from sickbay.reference.text.tokenizer import ByteTokenizer

LINES = st.text(st.sampled_from("ab c\té\r日.,"), max_size=60)
SHARES = st.floats(0, 0.99)


def rng(seed: int) -> np.random.Generator:
    return np.random.default_rng(seed)


@given(line=LINES, share=SHARES, seed=st.integers(0, 99))
def test_deletion_leaves_words_in_order_at_least_one_and_the_rest_of_the_line(line: str, share: float, seed: int) -> None:
    kept = delete_words(line, share, rng(seed))
    words, left = line.split(), iter(line.split())
    assert all(any(word == other for other in left) for word in kept.split()), "in order"
    assert bool(kept.split()) == bool(words)
    assert kept == delete_words(line, share, rng(seed))
    assert delete_words(line, 0, rng(seed)) == line


@given(line=LINES, share=SHARES, seed=st.integers(0, 99))
def test_swapping_moves_each_word_by_at_most_one_and_no_space(line: str, share: float, seed: int) -> None:
    swapped = swap_words(line, share, rng(seed))
    assert [character.isspace() for character in swapped].count(True) == [character.isspace() for character in line].count(True)
    words, moved = line.split(), swapped.split()
    assert Counter(words) == Counter(moved)
    here = 0
    while here < len(words):
        if words[here] == moved[here]:
            here += 1
        else:
            assert words[here : here + 2] == moved[here : here + 2][::-1]
            here += 2
    assert swap_words(line, 0, rng(seed)) == line


def test_about_the_share_of_words_is_deleted_and_swapped() -> None:
    line = " ".join(str(number) for number in range(20_000))
    assert len(delete_words(line, 0.1, rng(0)).split()) == pytest.approx(18_000, abs=220)  # 5 standard errors
    moved = sum(word != str(number) for number, word in enumerate(swap_words(line, 0.1, rng(0)).split()))
    # A word that is just swapped is not picked again: 0.1 / 1.1 of the places begin a swap, which moves two.
    assert moved == pytest.approx(2 * 20_000 * 0.1 / 1.1, abs=400)


def test_lines_with_words_are_translated_there_and_back_in_order() -> None:
    def shout(lines: Sequence[str]) -> list[str]:
        return [line.upper() for line in lines]

    def twice(lines: Sequence[str]) -> list[str]:
        return [f"{line}\n{line}" for line in lines]

    assert back_translated(["one", "", "  ", "two"], shout, twice) == ["ONE ONE", "", "  ", "TWO TWO"]
    assert back_translated(["", " "], shout, twice) == ["", " "]
    with pytest.raises(ValueError, match="translation of 2 lines has 1"):
        back_translated(["one", "two"], shout, lambda lines: list(lines)[:1])


def test_a_text_is_altered_by_its_seed_and_place_alone() -> None:
    text = "one two three four five six seven\n" * 20
    change = Augmentation(delete=0.2, swap=0.2, seed=4)
    assert change.of_text(text, 0, 1) == change.of_text(text, 0, 1) != change.of_text(text, 0, 2)
    assert change.of_text(text, 0, 1) != Augmentation(delete=0.2, swap=0.2, seed=5).of_text(text, 0, 1)
    assert change.of_text(text, 0, 1).count("\n") == 20
    assert Augmentation().of_text(text, 0) == text


@settings(deadline=None, max_examples=25)
@given(sizes=st.lists(st.integers(0, 40), min_size=1, max_size=12).filter(any), percent=st.integers(5, 60), several=st.booleans())
def test_copies_are_made_of_the_training_text_alone(
    tmp_path_factory: pytest.TempPathFactory, sizes: list[int], percent: int, several: bool
) -> None:
    folder, lines = (
        tmp_path_factory.mktemp("augmented"),
        [f"d{number}w{word} é" for number, size in enumerate(sizes) for word in range(size)],
    )
    path = folder / ("rows.jsonl" if several else "text.txt")
    if several:
        texts = ["".join(f"d{number}w{word} é\n" for word in range(size)) for number, size in enumerate(sizes)]
        path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts), encoding="utf-8")
    else:
        path.write_text("".join(f"{line}\n" for line in lines), encoding="utf-8")
    chosen = {"tokenizer": "bytes", "val_share": percent / 100}
    plain = data.prepare(path, folder / "tokens", DataSettings(**chosen))
    both = data.prepare(path, folder / "tokens", DataSettings(**chosen, swap_words=0.5, copies=2))
    assert both.val.tolist() == plain.val.tolist()
    assert both.train[: len(plain.train)].tolist() == plain.train.tolist()
    added, end = np.asarray(both.train[len(plain.train) :]), ByteTokenizer.end_of_text

    def words(tokens: np.ndarray) -> list[str]:
        return bytes(np.asarray(tokens)[np.asarray(tokens) != end].astype(np.uint8).tolist()).decode(errors="replace").split()

    whole_lines = [word for word in words(plain.train) if word.startswith("d") and word in {line.split()[0] for line in lines}]
    validation = {word for word in words(plain.val) if word.startswith("d")}
    copied = [word for word in words(added) if word.startswith("d")]
    assert not validation & set(copied)
    # Of a text that is cut, the line that the cut goes through is in no copy.
    missing = Counter(whole_lines * 2) - Counter(copied)
    cut = not several or (len(plain.train) > 0 and plain.train[-1] != end)
    assert sum(missing.values()) <= (2 if cut else 0)


def test_augmenting_warns_and_not_augmenting_does_not(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    text = tmp_path / "text.txt"
    text.write_text("one two three four five\n" * 30)
    plain = data.prepare(text, tmp_path / "tokens")
    assert capsys.readouterr().err == ""
    for _ in range(2):  # also when the tokens are found again
        more = data.prepare(text, tmp_path / "tokens", DataSettings(delete_words=0.1, copies=3))
        assert "teach a causal language model to write such text" in capsys.readouterr().err
    assert len(plain.train) * 3.4 < len(more.train) < len(plain.train) * 4
    assert len(more.val) == len(plain.val)
    assert "translation models' mistakes" in augment.warning(DataSettings(translate_there="a", translate_back="b"))


@pytest.fixture(scope="module")
def translation_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of transformers with a tiny encoder-decoder of random weights and its tokenizer."""
    tokenizers, transformers = pytest.importorskip("tokenizers"), pytest.importorskip("transformers")
    folder = tmp_path_factory.mktemp("model")
    words = ["<pad>", "</s>", "<unk>", "one", "two", "three", "four", "five"]
    library = tokenizers.Tokenizer(tokenizers.models.WordLevel({word: number for number, word in enumerate(words)}, unk_token="<unk>"))
    library.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    tokenizer = transformers.PreTrainedTokenizerFast(tokenizer_object=library, pad_token="<pad>", eos_token="</s>", unk_token="<unk>")
    tokenizer.save_pretrained(folder)
    torch.manual_seed(0)
    config = transformers.T5Config(
        vocab_size=8, d_model=16, d_kv=8, d_ff=16, num_layers=1, num_heads=2, decoder_start_token_id=0, pad_token_id=0, eos_token_id=1
    )
    model = transformers.T5ForConditionalGeneration(config)
    model.generation_config.suppress_tokens = [0, 1, 2]  # random weights say words, not nothing
    model.save_pretrained(folder)
    return folder


def test_two_local_translation_models_translate_back_and_repeat(
    tmp_path: Path, translation_model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(augment, "MOST_TRANSLATED_TOKENS", 6)
    translate = augment.translator(translation_model)
    lines = ["one two three", "four", "five two"] * 7
    said = translate(lines)
    assert len(said) == len(lines) and translate(lines) == said
    text = tmp_path / "text.txt"
    text.write_text("one two three four five\n" * 12)
    folder = str(translation_model)
    chosen = DataSettings(tokenizer="bytes", translate_there=folder, translate_back=folder)
    added = data.prepare(text, tmp_path / "tokens", chosen)
    plain = data.prepare(text, tmp_path / "tokens", DataSettings(tokenizer="bytes"))
    copy = added.tokenizer.decode(added.train[len(plain.train) :])
    (once,) = translate(translate(["one two three four five"]))
    assert copy == f"{once}\n" * (len(plain.train) // 24)


def test_a_translation_model_that_is_not_there_or_damaged_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"no translation model at .*absent; it must be a folder of transformers"):
        augment.translator(tmp_path / "absent")
    (tmp_path / "config.json").write_text('{"model_type": "t5"}')
    with pytest.raises(UsageError, match="cannot be loaded"):
        augment.translator(tmp_path)
