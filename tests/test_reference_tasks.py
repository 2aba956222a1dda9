"""`sickbay train --objective`: an encoder and an encoder-decoder are trained, resumed, judged and used as a decoder is."""

from __future__ import annotations

import dataclasses
import json
import math
import shutil
from pathlib import Path
from types import ModuleType
from typing import Any, get_args

import numpy as np
import pytest
import torch
from commands import call
from safetensors.torch import load_file

from sickbay.cli import generate as generate_command
from sickbay.cli import train as train_command
from sickbay.core.errors import UsageError
from sickbay.reference import data
from sickbay.reference.data.pairs import Pairs, Translation
from sickbay.reference.data.sources import Text
from sickbay.reference.data.tasks import Task, objective_of, task_of
from sickbay.reference.evaluation.evaluation import evaluate
from sickbay.reference.evaluation.guesses import counts, guesses
from sickbay.reference.models import pretrained
from sickbay.reference.models.config import Config
from sickbay.reference.models.kinds import OF_OBJECTIVE, kind_of, model_for
from sickbay.reference.models.model import Transformer
from sickbay.reference.saving import checkpoint
from sickbay.reference.settings.recipe import Objective, Recipe
from sickbay.reference.text.marked import Marked
from sickbay.reference.text.prune_checkpoint import prune_checkpoint
from sickbay.reference.text.tokenizer import CharTokenizer

SMALL = ("--layers", "1", "--heads", "2", "--dim", "16", "--context", "16", "--batch", "4", "--warmup", "2", "--dropout", "0.1")
OBJECTIVES = pytest.mark.parametrize("objective", get_args(Objective))
ASKED = {"masked-token": "masked token", "span-corruption": "target token", "pairs": "target token"}


@pytest.fixture
def pairs(tmp_path: Path) -> Path:
    """A word and the word backwards, 200 times."""
    file = tmp_path / "pairs.tsv"
    words = ["".join("abcdef"[int(digit) % 6] for digit in str(7919 * number)) for number in range(1, 201)]
    file.write_text("".join(f"{word}\t{word[::-1]}\n" for word in words), encoding="utf-8")
    return file


def trained(objective: str, folder: Path, text: Path, pairs: Path, *more: str) -> Path:
    """A run of eight steps, with a checkpoint after four."""
    source = pairs if objective == "pairs" else text
    words = ("--objective", objective, "--steps", "8", "--save-every", "4", "--eval-every", "3", *more)
    assert call(train_command, source, "--out", folder, *SMALL, *words) == 0
    return folder


@OBJECTIVES
@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_a_resumed_run_is_bit_equal(objective: str, optimizer: str, tmp_path: Path, text: Path, pairs: Path) -> None:
    whole = trained(objective, tmp_path / "whole", text, pairs, "--optimizer", optimizer, "--ema", "0.9", "--accumulation", "2")
    state = checkpoint.read(whole)
    assert state.kind == OF_OBJECTIVE[objective] and state.recipe["objective"] == objective  # type: ignore[index]
    broken = tmp_path / "broken"
    shutil.copytree(whole / "step-000004", broken / "step-000004")
    shutil.copy(whole / "config.toml", broken)
    assert call(train_command, "--out", broken, "--resume") == 0
    for name in ("model", "average", "optimizer", "random"):
        left, right = (load_file(run / "step-000008" / f"{name}.safetensors") for run in (whole, broken))
        assert left.keys() == right.keys()
        assert [key for key in left if not torch.equal(left[key], right[key])] == []


@pytest.mark.parametrize("objective", ASKED)
def test_the_card_says_what_applies_instead_of_n_grams(
    objective: str, tmp_path: Path, text: Path, pairs: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    trained(objective, tmp_path / "run", text, pairs)
    captured = capsys.readouterr()
    said = captured.out
    assert "validation loss" in captured.err and "bits per byte" not in captured.err + said
    assert f"nats per {ASKED[objective]} over" in said
    assert f"of the {ASKED[objective]}s, always the commonest" in said
    assert "no n-gram tables: " in said and "trigram" not in said
    assert ("other source" in said) == (OF_OBJECTIVE[objective] == "encoder-decoder")  # type: ignore[index]
    assert ("sickbay generate" in said) == (objective != "masked-token")
    assert said.index("sample\n") < said.index("the model\n") < said.index("was\n")
    assert len(said.splitlines()) <= 30


@OBJECTIVES
def test_the_result_is_what_the_checkpoint_loses(
    objective: Objective, tmp_path: Path, text: Path, pairs: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    trained(objective, tmp_path / "run", text, pairs, "--json")
    result = json.loads(capsys.readouterr().out)
    state = checkpoint.read(tmp_path / "run")
    source = pairs if objective == "pairs" else text
    corpus = data.prepare(source, tmp_path / "again", tokenizer=state.tokenizer, pairs=objective == "pairs")
    task = task_of(corpus, state.config, Recipe(**{**state.recipe, "batch_size": 7}))
    if objective in ("next-token", "pairs"):  # what is hidden in a row depends on its batch
        found = evaluate(checkpoint.load_model(state), task.spread("val"), state.config.pad_id)
        assert (found.loss, found.accuracy) == pytest.approx((result["val_loss"], result["val_accuracy"]), rel=1e-5)
        assert found.tokens == result["val_tokens"]
    assert (result["bits_per_byte"] is None) == (objective != "next-token")
    assert 0 < result["val_loss"] < math.log(state.config.vocab_size) + 0.1 and 0 <= result["val_accuracy"] < 1


def task_for(objective: Objective, text: Path, pairs: Path, folder: Path, **changes: Any) -> Task:
    recipe = Recipe(objective=objective, batch_size=4)
    corpus = data.prepare(pairs if objective == "pairs" else text, folder, pairs=objective == "pairs")
    shape = Config(dim=16, num_layers=1, num_heads=2, context=16, **changes)
    found = objective_of(recipe, shape, corpus.tokenizer)
    shape = dataclasses.replace(shape, vocab_size=corpus.tokenizer.vocab_size + found.extra_ids)
    return task_of(corpus, dataclasses.replace(shape, pad_id=found.pad_id) if isinstance(found, Translation) else shape, recipe)


@OBJECTIVES
def test_batches_are_the_same_however_many_processes_share_them(objective: Objective, tmp_path: Path, text: Path, pairs: Path) -> None:
    task = task_for(objective, text, pairs, tmp_path / "tokens")
    for whole, *parts in zip(task.training(3), *(task.training(3, slice(rank, None, 3)) for rank in range(3)), range(2), strict=False):
        del parts[-1]
        for each, *shared in zip(whole, *parts, strict=True):
            joined = torch.cat([shared[0][:1], shared[1], shared[2], shared[0][1:]])  # rows 0 and 3 are the first one's
            assert torch.equal(joined, each)
    alone = list(task.spread("val", 5))
    shares = [list(task.spread("val", 5, slice(rank, None, 2))) for rank in range(2)]
    assert [len(alone[0][-1]), len(alone[1][-1])] == [4, 1]
    assert len(shares[0]) == len(shares[1]) == 2
    assert torch.equal(shares[0][1][-1], alone[1][-1])
    assert (shares[1][1][-1] == -100).all(), "who has no row has one that does not count"
    assert all(torch.equal(left, right) for left, right in zip(alone[1], list(task.spread("val", 5))[1]))


@pytest.mark.parametrize("objective", ["masked-token", "span-corruption"])
def test_all_whole_windows_of_the_validation_part_are_rows(objective: Objective, tmp_path: Path, text: Path, pairs: Path) -> None:
    task = task_for(objective, text, pairs, tmp_path / "tokens")
    rows = sum(len(batch[-1]) for batch in task.spread("val"))
    assert rows == (len(task.corpus.val) - 1) // 16
    asked = sum(int((batch[-1] != -100).sum()) for batch in task.spread("val"))
    assert counts(task, "val").sum() == asked == rows * (2 if objective == "masked-token" else 4)  # 15 % of 16; one span and two sentinels


def test_packed_rows_of_an_encoder_tell_their_documents(tmp_path: Path) -> None:
    for number in range(4):
        (tmp_path / f"{number}.txt").write_text(f"{number} is a text of its own. " * 8)
    settings = data.DataSettings(tokenizer="bytes", packed=True)
    recipe = Recipe(objective="masked-token", batch_size=8)
    task = task_of(data.prepare(tmp_path, tmp_path / "tokens", settings), Config(vocab_size=258, context=32), recipe, settings)
    ids, documents, targets = next(task.training(first=0))
    assert ids.shape == documents.shape == targets.shape
    assert documents.max() == 1 and 256 not in targets
    assert torch.equal(ids == 256, documents.diff(dim=1, append=documents[:, -1:]) == 1), "a document ends where its end is"


def test_counts_and_another_rows_source_are_what_a_model_is_held_against(tmp_path: Path, text: Path, pairs: Path) -> None:
    task = task_for("pairs", text, pairs, tmp_path / "tokens", dropout=0.5)
    torch.manual_seed(0)
    model = model_for("pairs", task.config)
    found = guesses(task, model, torch.device("cpu"))
    own = evaluate(model, task.spread("val"), task.config.pad_id)
    assert found.other_source is not None
    assert 0 < abs(found.other_source - own.loss) < 0.05, "an untrained model hardly reads its source"
    assert found.uniform == math.log(task.config.vocab_size)
    assert found.unigram < math.log(8) < found.uniform, "six letters and an end"
    targets = torch.cat([batch[-1][batch[-1] != -100] for batch in task.spread("val")])
    assert found.commonest == pytest.approx(float((targets == targets.mode().values).float().mean()), abs=0.2)
    encoder = task_for("masked-token", text, pairs, tmp_path / "tokens")
    assert guesses(encoder, model_for("masked-token", encoder.config), torch.device("cpu")).other_source is None


def test_pairs_are_read_alike_from_tsv_and_jsonl_and_no_pair_is_cut(tmp_path: Path, pairs: Path) -> None:
    rows = [line.split("\t") for line in pairs.read_text().splitlines()]
    (tmp_path / "more").mkdir()
    lines = [json.dumps({"en": source, "de": target, "id": 3}) for source, target in rows]
    (tmp_path / "more" / "pairs.jsonl").write_text("\n\n".join(lines) + "\n")
    settings = data.DataSettings(source_field="en", target_field="de")
    corpora = [data.prepare(place, tmp_path / "tokens", settings, pairs=True) for place in (pairs, tmp_path / "more")]
    for corpus in corpora:
        words = corpus.tokenizer
        held = [Pairs(tokens, Translation(words.vocab_size)) for tokens in (corpus.train, corpus.val)]
        told = [[words.decode(side) for side in pair] for part in held for pair in part]
        assert sorted(told) == sorted(rows)
        assert 15 <= len(held[1]) <= 25
        assert [words.decode(side) for side in held[0][-1]] == [words.decode(side) for side in held[0][:][-1]]
    assert all(np.array_equal(left, right) for left, right in zip((corpora[0].train, corpora[0].val), (corpora[1].train, corpora[1].val)))


@pytest.mark.parametrize(
    ("name", "line", "said"),
    [
        ("p.jsonl", "nonsense", "p.jsonl:2 is not JSON"),
        ("p.jsonl", '["a", "b"]', "p.jsonl:2 is list, not an object"),
        (
            "p.jsonl",
            '{"source": "a"}',
            "p.jsonl:2 has no field 'target' (it has: source); name the one that holds the text with --target",
        ),
        ("p.jsonl", '{"source": 3, "target": "b"}', "p.jsonl:2: the field 'source' is int, not text"),
        ("p.jsonl", '{"source": "", "target": "b"}', "p.jsonl:2 has an empty source; a pair has two texts"),
        ("p.tsv", "a\t", "p.tsv:2 has an empty target"),
        ("p.tsv", "a", "p.tsv:2 has 0 tabs; each line must be a source, one tab and its target"),
        ("p.tsv", "a\tb\tc", "p.tsv:2 has 2 tabs"),
        ("p.tsv", "a\tb", "has too few pairs for val_share=0.1; give more pairs, or others as val"),
        ("p.txt", "a\tb", "p.txt holds no pairs: they are read from files that end in .jsonl, .ndjson, .tsv"),
    ],
)
def test_a_line_that_is_no_pair_is_named(tmp_path: Path, name: str, line: str, said: str) -> None:
    first = '{"source": "a", "target": "b"}' if name == "p.jsonl" else "a\tb"
    (tmp_path / name).write_text(f"{first}\n{line}\n")
    with pytest.raises(UsageError) as refused:
        data.prepare(tmp_path / name, tmp_path / "tokens", pairs=True)
    assert said in str(refused.value)


def refusal(command: ModuleType, *words: str | Path) -> str:
    with pytest.raises(UsageError) as refused:
        call(command, *words)
    assert "\n" not in str(refused.value)
    return str(refused.value)


def test_what_does_not_go_together_is_refused_with_field_value_and_range(tmp_path: Path, text: Path, pairs: Path) -> None:
    out = tmp_path / "out"

    def said(objective: str, *words: str, source: Path = text) -> str:
        return refusal(train_command, source, "--out", out, *SMALL, "--objective", objective, *words)

    assert said("masked-token", "--mask-share", "1") == "mask_share is 1.0; it must be above 0 and below 1"
    assert said("span-corruption", "--mean-span", "0.5") == "mean_span is 0.5; it must be at least 1 and finite"
    assert "mask_share is 0.9; it must be such that a target, which has 17 tokens with mean_span=1, fits context=16" in said(
        "span-corruption", "--mask-share", "0.9", "--mean-span", "1"
    )
    assert "packed is True; it must be False with objective=span-corruption" in said("span-corruption", "--packed")
    assert "packed is True; it must be False with objective=pairs" in said("pairs", "--packed", source=pairs)
    assert "pairs are not augmented" in said("pairs", "--swap-words", "0.1", source=pairs)
    assert "text.txt holds no pairs" in said("pairs")
    assert "target_field is 'source'; it must be another field" in said("pairs", "--target-field", "source", source=pairs)
    assert "context is 4; it must be at least 8: the longest source has 7 tokens" in said("pairs", "--context", "4", source=pairs)
    assert "pad_id is 2; it must be left out with objective=pairs" in said("pairs", "--pad-id", "2", source=pairs)
    ids = len(set(text.read_text()))
    assert f"vocab_size is {ids}; it must be at least {ids + 1}, the tokenizer's ids and 1 of masked-token" in said(
        "masked-token", "--vocab-size", str(ids)
    )
    assert not list(out.glob("*"))


def test_a_run_goes_on_from_a_model_of_its_own_kind_alone(tmp_path: Path, text: Path, pairs: Path) -> None:
    for objective in ("next-token", "masked-token", "span-corruption"):
        trained(objective, tmp_path / objective, text, pairs, "--positions", "learned")
        words = ("--steps", "1", "--batch", "4", "--lr", "1e-9", "--from-pretrained", str(tmp_path / objective))
        assert call(train_command, text, "--out", tmp_path / f"{objective}-tuned", "--objective", objective, *words) == 0
        before, after = (checkpoint.load_model(checkpoint.read(tmp_path / f"{objective}{end}")) for end in ("", "-tuned"))
        assert kind_of(before) == kind_of(after)
        torch.testing.assert_close(dict(after.named_parameters()), dict(before.named_parameters()))
    folder = tmp_path / "transformers"
    pretrained.save(Transformer(Config(dim=16, num_layers=1, num_heads=2, context=16, activation="swiglu")), folder)
    assert "is of kind decoder; objective=masked-token trains one of kind encoder" in refusal(
        train_command, text, "--out", tmp_path / "other", "--from-pretrained", folder, "--objective", "masked-token"
    )
    longer = ("--objective", "span-corruption", "--context", "32", "--positions", "rotary")
    trained("span-corruption", tmp_path / "short", text, pairs)
    assert "4 of span-corruption; the trained model has no more: keep to its context and objective" in refusal(
        train_command, text, "--out", tmp_path / "other", "--from-pretrained", tmp_path / "short", *longer
    )
    assert "is of kind encoder; objective=next-token trains one of kind decoder" in refusal(
        train_command, text, "--out", tmp_path / "other", "--from-pretrained", tmp_path / "masked-token", "--steps", "1"
    )


def test_a_learning_rate_is_looked_for_whatever_the_objective(
    tmp_path: Path, text: Path, pairs: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for objective, source in (("masked-token", text), ("pairs", pairs)):
        assert call(train_command, source, *SMALL, "--objective", objective, "--find-lr", "--json") == 0
        assert len(json.loads(capsys.readouterr().out)["trials"]) > 50


def test_a_source_is_answered(tmp_path: Path, text: Path, pairs: Path, capsys: pytest.CaptureFixture[str]) -> None:
    spans, reversed_words = (trained(objective, tmp_path / objective, text, pairs) for objective in ("span-corruption", "pairs"))
    capsys.readouterr()
    words = ("--temperature", "0", "--tokens", "9")
    assert call(generate_command, spans, "--prompt", "Be<0> it", *words, "--json") == 0
    one = json.loads(capsys.readouterr().out)
    assert one["prompt"] == "Be<0> it" and one["tokens"] <= 9
    assert call(generate_command, spans, "--prompt", "Be<0> it", *words) == 0
    assert capsys.readouterr().out == one["text"] + "\n", "an answer does not go on from its source"
    assert call(generate_command, reversed_words, "--prompt", "abcde", "--prompt", "fa", "--beams", "3", "--num", "2", "--json") == 0
    found = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [each["prompt"] for each in found] == ["abcde", "abcde", "fa", "fa"]
    assert set("".join(each["text"] for each in found)) <= set("abcdef"), "padding and begin are never written"
    assert "has 1 to 1 holes, written <0>, <1> and so on, as in 'To be<0>not to be'; it has 0" in refusal(
        generate_command, spans, "--prompt", "Be it"
    )
    assert "the source has 18 tokens; this model reads from 1 to 16" in refusal(generate_command, reversed_words, "--prompt", "abcdef" * 3)
    assert "holds an encoder-decoder, which writes to a source; give it with --prompt" in refusal(generate_command, spans, "--num", "2")


def test_an_encoder_that_is_to_write_is_refused_in_one_line(tmp_path: Path, text: Path, pairs: Path) -> None:
    run = trained("masked-token", tmp_path / "run", text, pairs)
    assert refusal(generate_command, run).endswith("holds an encoder, which fills in masked tokens and writes no text; a decoder does")


@pytest.mark.parametrize("objective", ["masked-token", "span-corruption"])
def test_a_smaller_vocabulary_keeps_masks_and_sentinels(objective: str, tmp_path: Path, text: Path, pairs: Path) -> None:
    trained(objective, tmp_path / "run", text, pairs, "--tokenizer", "bpe", "--bpe-vocab", "300")
    old = checkpoint.read(tmp_path / "run")
    prune_checkpoint(tmp_path / "run", Text.at([text]), tmp_path / "less", keep=280)
    new = checkpoint.read(tmp_path / "less")
    extra = old.config.vocab_size - old.tokenizer.vocab_size
    assert extra in (1, 3) and new.config.vocab_size == 280 + extra
    kept = torch.tensor(json.loads((new.folder / "kept_ids.json").read_text()))
    assert kept[-extra:].tolist() == list(range(old.tokenizer.vocab_size, old.config.vocab_size))
    ids = torch.arange(270, 280 + extra)[None]
    inputs = 1 if objective == "masked-token" else 2
    was, now = (checkpoint.load_model(state).eval() for state in (old, new))
    torch.testing.assert_close(now(*[ids] * inputs), was(*[kept[ids]] * inputs)[..., kept], rtol=1e-5, atol=1e-6)


def test_marks_stand_for_the_ids_after_the_tokenizers() -> None:
    words = Marked(CharTokenizer("abc<>01"), ["", "<0>", "<1>"], begin=7, end=9)
    assert words.read("a<0>b<1>").tolist() == [0, 8, 1, 9]
    assert words.decode([7, 0, 8, 1, 9]) == "a<0>b<1>"
    assert words.encode("ab").tolist() == [7, 0, 1]
    assert (words.vocab_size, words.end_of_text) == (10, 9)
