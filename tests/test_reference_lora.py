"""Adapters start as nothing, are all that is trained, and merge into the same function; frozen weights do not move."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from sickbay.core.errors import UsageError
from sickbay.reference.models import lora, pretrained
from sickbay.reference.models.config import Config
from sickbay.reference.models.encoder_decoder import EncoderDecoder
from sickbay.reference.models.freeze import freeze
from sickbay.reference.models.model import Transformer
from sickbay.reference.training.loss import next_token_loss

TINY = Config(dim=16, num_layers=2, num_heads=2, vocab_size=11, context=12, activation="swiglu", bias=True)


def model_of(**changes: Any) -> Transformer:
    torch.manual_seed(0)
    model = Transformer(Config(**{**TINY.__dict__, **changes}))
    with torch.no_grad():
        for weight in model.parameters():
            weight.add_(torch.randn_like(weight) * 0.2)
    return model


def ids_of(rows: int = 2, positions: int = 12, seed: int = 0) -> Tensor:
    return torch.randint(11, (rows, positions), generator=torch.Generator().manual_seed(seed))


def trained(model: torch.nn.Module, steps: int = 5) -> Any:
    optimizer = torch.optim.AdamW([weight for weight in model.parameters() if weight.requires_grad], lr=0.01)
    for step in range(steps):
        next_token_loss(model, ids_of(seed=step), ids_of(seed=step + 50)).backward()
        optimizer.step()
        optimizer.zero_grad()
    return model


def snapshot(model: torch.nn.Module) -> dict[str, Tensor]:
    return {name: weight.detach().clone() for name, weight in model.named_parameters()}


def test_new_adapters_change_nothing_and_are_all_that_is_trained() -> None:
    model = model_of()
    before, logits = snapshot(model), model(ids_of())
    names = lora.apply(model, rank=3, alpha=6)
    assert names == [f"blocks.{n}.attention.{part}" for n in (0, 1) for part in ("query_key_value",)] + [
        f"blocks.{n}.attention.output" for n in (0, 1)
    ]
    assert torch.equal(model(ids_of()), logits)
    trainable = [name for name, weight in model.named_parameters() if weight.requires_grad]
    assert sorted(trainable) == sorted(f"{name}.lora_{part}" for name in names for part in "ab")
    trained(model)
    after = snapshot(model)
    assert all(torch.equal(before[name], after[name]) for name in before)
    assert all(after[f"{name}.lora_b"].any() for name in names)
    assert not torch.allclose(model(ids_of()), logits, atol=1e-3)


def test_the_layer_is_the_papers_formula() -> None:
    model = model_of()
    lora.apply(model, rank=3, alpha=6, targets=["feed_forward.down"])
    trained(model)
    layer, x = model.blocks[1].feed_forward.down, torch.randn(5, 64)
    weight = layer.weight + 6 / 3 * layer.lora_b @ layer.lora_a
    torch.testing.assert_close(layer(x), x @ weight.T + layer.bias)


@pytest.mark.parametrize("targets", [lora.TARGETS, ["*"], ["blocks.0.*"]])
def test_merged_layers_are_plain_and_have_the_same_function(targets: list[str]) -> None:
    model = model_of(tied_embeddings=False)
    plain = {name: type(module) for name, module in model.named_modules()}
    names = list(model.state_dict())
    lora.apply(model, rank=2, alpha=4, targets=targets)
    trained(model)
    logits = model(ids_of())
    lora.merge(model)
    torch.testing.assert_close(model(ids_of()), logits, atol=1e-5, rtol=1e-5)
    assert {name: type(module) for name, module in model.named_modules()} == plain
    assert list(model.state_dict()) == names


def test_merged_models_are_written_for_transformers_and_others_are_not(tmp_path: Path) -> None:
    model = model_of()
    lora.apply(model, rank=2, alpha=4)
    trained(model)
    logits = model(ids_of())
    with pytest.raises(UsageError, match="merge them first"):
        pretrained.save(model, tmp_path / "saved")
    lora.merge(model)
    pretrained.save(model, tmp_path / "saved")
    torch.testing.assert_close(pretrained.load(tmp_path / "saved")[0](ids_of()), logits, atol=1e-5, rtol=1e-5)


def test_adapters_alone_are_saved_and_fit_the_model_they_were_trained_on(tmp_path: Path) -> None:
    base = model_of()
    model = copy.deepcopy(base)
    lora.apply(model, rank=3, alpha=5.5, targets=["query_key_value", "up"])
    trained(model)
    lora.save(model, tmp_path / "adapters.safetensors")
    assert {name.rpartition(".")[2] for name in load_file(tmp_path / "adapters.safetensors")} == {"lora_a", "lora_b", "alpha"}
    names = lora.load(base, tmp_path / "adapters.safetensors")
    assert len(names) == 4
    assert torch.equal(base(ids_of()), model(ids_of()))
    assert {n for n, w in base.named_parameters() if w.requires_grad} == {n for n, w in model.named_parameters() if w.requires_grad}


@pytest.mark.parametrize(("changes", "words"), [({"num_layers": 1}, "no such layer"), ({"dim": 32}, r"a layer \(32, 32\)")])
def test_adapters_of_another_model_are_refused_and_leave_the_model_as_it_was(tmp_path: Path, changes: dict[str, Any], words: str) -> None:
    model = model_of()
    lora.apply(model, rank=3, alpha=3)
    lora.save(model, tmp_path / "adapters.safetensors")
    other = model_of(**changes)
    with pytest.raises(UsageError, match=words):
        lora.load(other, tmp_path / "adapters.safetensors")
    assert not lora._adapted(other)
    assert all(weight.requires_grad for weight in other.parameters())


def test_files_without_adapters_are_refused(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="no adapters to save"):
        lora.save(model_of(), tmp_path / "adapters.safetensors")
    with pytest.raises(UsageError, match="holds no adapters"):
        lora.load(model_of(), tmp_path / "nothing.safetensors")
    (tmp_path / "text.safetensors").write_text("hello, this is a text and no safetensors file")
    with pytest.raises(UsageError, match="holds no adapters"):
        lora.load(model_of(), tmp_path / "text.safetensors")


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"rank": 0, "alpha": 1}, ["rank is 0", "from 1 to 16"]),
        ({"rank": 17, "alpha": 1}, ["rank is 17", "from 1 to 16"]),
        ({"rank": 2, "alpha": 0.0}, ["alpha is 0.0", "above 0"]),
        ({"rank": 2, "alpha": 1, "targets": ["c_attn"]}, ["'c_attn'", "attention.query_key_value", "feed_forward.gate", "head"]),
        ({"rank": 2, "alpha": 1, "targets": ["head"]}, ["head", "token_embedding.weight = head.weight"]),
        ({"rank": 2, "alpha": 1, "targets": []}, ["empty"]),
    ],
)
def test_impossible_adapters_are_refused_and_leave_the_model_as_it_was(arguments: dict[str, Any], words: list[str]) -> None:
    model = model_of()
    with pytest.raises(UsageError) as refusal:
        lora.apply(model, **arguments)
    assert all(word in str(refusal.value) for word in words), refusal.value
    assert all(weight.requires_grad for weight in model.parameters())
    assert not lora._adapted(model)


def test_both_attentions_of_an_encoder_decoder_take_adapters() -> None:
    torch.manual_seed(0)
    model = EncoderDecoder(TINY)
    assert "decoder.blocks.1.cross_attention.key_value" in lora.apply(model, rank=2, alpha=2, targets=["key_value", "query_key_value"])
    model(ids_of(), ids_of(seed=1)).sum().backward()
    assert all(layer.lora_b.grad.abs().sum() > 0 for layer in lora._adapted(model).values())


@pytest.mark.parametrize(
    ("pattern", "expected"),
    [
        ("token_embedding", ["token_embedding.weight", "head.weight"]),
        ("head", ["token_embedding.weight", "head.weight"]),
        ("blocks.1.attention.output", ["blocks.1.attention.output.weight", "blocks.1.attention.output.bias"]),
        ("blocks.[01].feed_forward_norm", ["blocks.0.feed_forward_norm.weight", "blocks.1.feed_forward_norm.weight"]),
        ("*.down.bias", ["blocks.0.feed_forward.down.bias", "blocks.1.feed_forward.down.bias"]),
    ],
)
def test_frozen_weights_do_not_move_and_all_others_do(pattern: str, expected: list[str]) -> None:
    model = model_of()
    before = snapshot(model)
    freeze(model, [pattern])
    trained(model)
    unmoved = [
        name
        for name, weight in model.named_parameters(remove_duplicate=False)
        if torch.equal(before.get(name, before["token_embedding.weight"]), weight)
    ]
    assert sorted(unmoved) == sorted(expected)


def test_block_1_is_not_block_10() -> None:
    assert {name.split(".")[1] for name in freeze(model_of(num_layers=11), ["blocks.1"])} == {"1"}


@pytest.mark.parametrize(
    ("patterns", "words"), [(["block.0"], ["'block.0'", "blocks", "token_embedding"]), (["blocks", "*"], ["nothing to train"])]
)
def test_patterns_that_match_nothing_or_all_are_refused_and_freeze_nothing(patterns: list[str], words: list[str]) -> None:
    model = model_of()
    with pytest.raises(UsageError) as refusal:
        freeze(model, patterns)
    assert all(word in str(refusal.value) for word in words), refusal.value
    assert all(weight.requires_grad for weight in model.parameters())
