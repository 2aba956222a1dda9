"""The settings of a run: flags, TOML, presets, what overrules what, and what is refused."""

from __future__ import annotations

import argparse
import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

import commands
import pytest
import torch
from hypothesis import given
from hypothesis import settings as how
from hypothesis import strategies as st
from safetensors.torch import load_file

from sickbay.cli import train as train_command
from sickbay.core.errors import UsageError
from sickbay.reference import data
from sickbay.reference.models.config import Config
from sickbay.reference.models.model import Transformer
from sickbay.reference.saving import checkpoint
from sickbay.reference.settings import flags, settings
from sickbay.reference.settings.presets import PRESETS
from sickbay.reference.settings.recipe import Recipe

SMALL = ("--layers", "1", "--heads", "2", "--dim", "16", "--context", "16", "--batch", "4", "--warmup", "2", "--eval-every", "0")


def call(*words: str | Path) -> int:
    return commands.call(train_command, *words)


def refusal(*words: str | Path) -> str:
    with pytest.raises(UsageError) as refused:
        call(*words)
    assert "\n" not in str(refused.value)
    return str(refused.value)


def weights(run: Path) -> dict[str, torch.Tensor]:
    return load_file(checkpoint.find(run) / "model.safetensors")


def test_every_setting_has_a_meaning_and_a_name_of_its_own() -> None:
    names = [field for table in settings.TABLES for field in settings.fields_of(table)]
    assert len(set(names)) == len(names)
    for table in settings.TABLES:
        assert settings.meanings(table).keys() == settings.fields_of(table).keys(), table


numbers = st.floats(1e-6, 0.9, allow_nan=False)
words = st.text(st.characters(exclude_categories=["Cs"]), min_size=1)
recipes = st.builds(
    Recipe,
    steps=st.integers(1, 10**9),
    learning_rate=st.floats(1e-3, 1e3),
    min_learning_rate=st.none() | st.floats(0, 1e-3),
    clip=st.none() | numbers,
    ema=st.none() | numbers,
    patience=st.none() | st.integers(1, 9),
    compile=st.booleans(),
    schedule=st.sampled_from(["cosine", "linear", "wsd", "constant"]),
)
texts = st.lists(words.filter(lambda word: word != settings.NONE), max_size=3).map(tuple)


@how(deadline=None)
@given(recipes, words.filter(lambda word: word != settings.NONE), texts)
def test_what_is_written_is_read_back(tmp_path_factory: pytest.TempPathFactory, recipe: Recipe, val: str, texts: tuple[str, ...]) -> None:
    path = tmp_path_factory.getbasetemp() / "config.toml"
    whole = settings.Settings(Config(), recipe, data.DataSettings(val=val), texts)
    settings.write(whole, path)
    tables, read_texts, preset = settings.read(path)
    assert settings.checked(tables, read_texts) == whole
    assert preset is None


def test_a_flag_overrules_the_file_the_file_its_preset_and_the_preset_the_default(tmp_path: Path) -> None:
    file = tmp_path / "run.toml"
    file.write_text('preset = "small"\n[model]\nnum_layers = 3\nnum_heads = 2\n[recipe]\nclip = "none"\nsteps = 2e3\nlearning_rate = 1\n')
    parser = argparse.ArgumentParser()
    train_command.add_arguments(parser)
    asked, _ = train_command._asked(parser.parse_args(["text", "--config", str(file), "--heads", "4"]))
    found = settings.checked(asked, ())
    assert (found.model.num_heads, found.model.num_layers, found.model.dim, found.model.norm) == (4, 3, 384, "rmsnorm")
    assert (found.recipe.clip, found.recipe.steps, found.recipe.learning_rate, found.recipe.batch_size) == (None, 2000, 1.0, 64)
    assert isinstance(found.recipe.steps, int) and isinstance(found.recipe.learning_rate, float)


@pytest.mark.parametrize(
    ("toml", "words"),
    [
        ("[recipe]\nstepz = 3", ["run.toml", "[recipe]", "'stepz'", "did you mean steps in [recipe]?"]),
        ("[model]\nsteps = 3", ["'steps'", "it belongs in [recipe]"]),
        ("steps = 3", ["'steps'", "it belongs in [recipe]"]),
        ("[modle]\ndim = 3", ["'modle'", "did you mean model?"]),
        ("recipe = 3", ["recipe is 3", "[recipe]"]),
        ('preset = "smal"', ["preset is 'smal'", "tiny, small, base, gpt2"]),
        ("text = 3", ["text is 3", "list of paths"]),
        ("a = [", ["run.toml is not TOML"]),
        ("[model]\ndim = 10\nnum_heads = 4", ["num_heads is 4", "divisor of dim=10"]),
        ('[recipe]\nbatch_size = "12"', ["batch_size is '12'", "an integer of at least 1"]),
        ("[recipe]\nlearning_rate = true", ["learning_rate is True", "above 0"]),
        ("[recipe]\nsteps = 1.5", ["steps is 1.5", "an integer"]),
        ('[recipe]\nprecision = "int8"', ["precision is 'int8'", "fp32, bf16, fp16"]),
        ("[recipe]\npatience = 2\neval_every = 0", ["patience is 2", "without evaluations"]),
    ],
)
def test_a_bad_file_is_refused_in_one_line_naming_setting_value_and_range(tmp_path: Path, toml: str, words: list[str]) -> None:
    (tmp_path / "run.toml").write_text(toml)
    said = refusal("text", "--config", tmp_path / "run.toml", "--out", tmp_path / "out")
    assert all(word in said for word in words), said
    assert not (tmp_path / "out").exists()


def test_what_no_run_can_have_is_refused_before_anything_is_written(tmp_path: Path, text: Path) -> None:
    out = tmp_path / "out"
    assert "cannot be read" in refusal(text, "--config", tmp_path / "absent.toml", "--out", out)
    assert "give a text file" in refusal("--out", out)
    assert "vocab_size is 12; it must be at least" in refusal(text, "--vocab-size", "12", "--out", out)
    assert "context=4096 needs at least" in refusal(text, "--context", "4096", "--out", out)
    assert not out.exists()


def test_a_flag_that_is_no_number_is_refused_by_its_name(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        call("text", "--steps", "many")
    assert "--steps: 'many' is not a whole number" in capsys.readouterr().err


@pytest.mark.parametrize("name", PRESETS)
def test_every_preset_is_a_model_that_can_be_trained(name: str) -> None:
    found = settings.checked(settings.layered(PRESETS[name]), ())
    with torch.device("meta"):
        model = Transformer(dataclasses.replace(found.model, vocab_size=50_257 if name == "gpt2" else 65))
    parameters = sum(parameter.numel() for parameter in model.parameters())
    if name == "gpt2":
        assert parameters == 124_439_808  # GPT-2 small, Radford et al. 2019 as released
    if name == "tiny":
        assert found == settings.Settings(Config(), Recipe(), data.DataSettings())


def test_the_folder_keeps_all_settings_and_repeats_the_run(tmp_path: Path, text: Path) -> None:
    call(text, "--out", tmp_path / "first", *SMALL, "--steps", "4", "--optimizer", "muon", "--clip", "0", "--qk-norm")
    call("--config", tmp_path / "first" / "config.toml", "--out", tmp_path / "second")
    first, second = weights(tmp_path / "first"), weights(tmp_path / "second")
    assert [name for name in first if not torch.equal(first[name], second[name])] == []
    tables, texts, _ = settings.read(tmp_path / "first" / "config.toml")
    assert tables["recipe"]["clip"] is None and tables["model"]["qk_norm"] is True
    assert tables["recipe"]["precision"] in ("fp32", "bf16")  # what "auto" came to on this machine
    assert texts == (str(text),)
    assert tables["model"]["vocab_size"] == checkpoint.read(tmp_path / "first").tokenizer.vocab_size


def test_a_resumed_run_needs_no_text_and_may_get_more_steps_alone(tmp_path: Path, text: Path) -> None:
    call(text, "--out", tmp_path / "run", *SMALL, "--steps", "2")
    assert "momentum was 0.95" in refusal("--out", tmp_path / "run", "--resume", "--steps", "4", "--momentum", "0.9")
    assert "order was random" in refusal("--out", tmp_path / "run", "--resume", "--steps", "4", "--order", "shuffled")
    call("--out", tmp_path / "run", "--resume", "--steps", "4")
    assert checkpoint.read(tmp_path / "run").step == 4
    assert settings.read(tmp_path / "run" / "config.toml")[0]["recipe"]["steps"] == 4


def test_a_warm_up_that_never_ends_is_told(tmp_path: Path, text: Path, capsys: pytest.CaptureFixture[str]) -> None:
    call(text, "--out", tmp_path / "short", *SMALL, "--steps", "2")
    assert "note: warmup is 2, the run has 2 steps" in capsys.readouterr().err
    call(text, "--out", tmp_path / "longer", *SMALL, "--steps", "3")
    assert "note" not in capsys.readouterr().err


def test_more_ids_than_the_tokenizer_has_may_be_asked_for(tmp_path: Path, text: Path) -> None:
    call(text, "--out", tmp_path / "run", *SMALL, "--steps", "1", "--vocab-size", "128")
    assert checkpoint.read(tmp_path / "run").config.vocab_size == 128


def test_a_range_test_prints_a_table_and_keeps_nothing(tmp_path: Path, text: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before = sorted(tmp_path.iterdir())
    assert call(text, *SMALL, "--find-lr", "--out", tmp_path / "run") == 0
    said = capsys.readouterr().out
    assert "learning rate" in said and "<- lowest" in said
    assert 1e-4 < float(said.rsplit("--lr ", 1)[1].split(",")[0]) < 0.3
    assert sorted(tmp_path.iterdir()) == before


def test_flags_and_fields_are_the_same_settings() -> None:
    parser = argparse.ArgumentParser()
    flags.add_flags(parser)
    options = {option for action in parser._actions for option in action.option_strings}
    for table in settings.TABLES:
        assert {f"--{field.replace('_', '-')}" for field in settings.fields_of(table)} <= options
    nothing: dict[str, Any] = {table: {} for table in settings.TABLES}
    assert flags.given(parser.parse_args([])) == nothing
    assert flags.given(parser.parse_args(["--no-bias", "--lr", "2", "--clip", "none"])) == {
        **nothing,
        "model": {"bias": False},
        "recipe": {"learning_rate": 2.0, "clip": None},
    }


def test_a_run_starts_from_another_s_weights_and_trains_what_it_may(tmp_path: Path, text: Path) -> None:
    first, second = tmp_path / "first", tmp_path / "second"
    call(text, "--out", first, *SMALL, "--steps", "2")
    # A learning rate of next to nothing: what is not the first run's weights would be a fresh start.
    call(text, "--out", second, "--from-pretrained", first, "--freeze", "token_embedding, *norm*", "--steps", "1", "--lr", "1e-12")
    before, after = weights(first), weights(second)
    assert settings.read(second / "config.toml")[0]["model"]["dim"] == 16
    for name, weight in before.items():
        frozen = "embedding" in name or "norm" in name
        assert torch.equal(weight, after[name]) if frozen else torch.allclose(weight, after[name], atol=1e-9), name


def test_adapters_are_trained_alone_saved_resumed_and_merged(tmp_path: Path, text: Path) -> None:
    first, second, whole = tmp_path / "first", tmp_path / "second", tmp_path / "whole"
    call(text, "--out", first, *SMALL, "--steps", "2")
    words = ("--from-pretrained", first, "--lora-rank", "2", "--lr", "0.01", "--eval-every", "0", "--warmup", "0", "--schedule", "constant")
    call(text, "--out", whole, *words, "--steps", "4")
    call(text, "--out", second, *words, "--steps", "2")
    call("--out", second, "--resume", "--steps", "4")
    before, adapted, unbroken = weights(first), weights(second), weights(whole)
    assert all(torch.equal(adapted[name], unbroken[name]) for name in adapted)
    assert all(torch.equal(before[name], adapted[name]) for name in before)
    b = adapted["blocks.0.attention.output.lora_b"]
    assert b.abs().sum() > 0
    merged = checkpoint.load_weights(checkpoint.read(second))
    expected = before["blocks.0.attention.output.weight"] + b @ adapted["blocks.0.attention.output.lora_a"] * 8
    torch.testing.assert_close(merged.blocks[0].attention.output.weight.detach(), expected)


def test_a_start_that_cannot_be_is_refused_and_leaves_nothing(tmp_path: Path, text: Path) -> None:
    first, out = tmp_path / "first", tmp_path / "out"
    call(text, "--out", first, *SMALL, "--steps", "1", "--positions", "learned")
    assert "dim is 16" in refusal(text, "--out", out, "--from-pretrained", first, "--dim", "32")
    assert "learned positions up to 16" in refusal(text, "--out", out, "--from-pretrained", first, "--context", "32")
    assert "absent" in refusal(text, "--out", out, "--from-pretrained", tmp_path / "absent")
    assert "no parameter is called 'nothing'" in refusal(text, "--out", out, *SMALL, "--freeze", "nothing")
    assert "lora rank is 99" in refusal(text, "--out", out, *SMALL, "--lora-rank", "99")
    assert "C++ compiler" in with_no_compiler(lambda: refusal(text, "--out", out, *SMALL, "--compile"))
    assert not out.exists()


def with_no_compiler(work: Callable[[], str]) -> str:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("CXX", "no-such-compiler")
        return work()
