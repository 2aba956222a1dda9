"""The reference's model, data, schedule and case do what they say."""

from __future__ import annotations

import dataclasses
import itertools
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from sickbay.reference import data, train
from sickbay.reference.case import Case, run, shipped_corpus
from sickbay.reference.data import CharTokenizer
from sickbay.reference.models.config import Config
from sickbay.reference.models.model import Transformer
from sickbay.reference.settings.recipe import Recipe
from sickbay.reference.training.loss import next_token_loss
from sickbay.reference.training.optimizer import make_adamw
from sickbay.reference.training.schedule import learning_rate_at

TINY = Config(dim=16, num_layers=2, num_heads=2, vocab_size=11, context=12)
STYLES = [
    {"norm": norm, "norm_place": place, "positions": positions, "activation": activation}
    for norm, place, positions, activation in itertools.product(
        ("layernorm", "rmsnorm"), ("pre", "post"), ("learned", "rotary"), ("gelu", "swiglu")
    )
]


def model_of(config: Config, seed: int = 0) -> Transformer:
    torch.manual_seed(seed)
    model = Transformer(config).eval()
    # At its initial 0.02 a tiny model's outputs hardly differ; larger weights make every dependence visible.
    with torch.no_grad():
        for weight in model.parameters():
            if weight.dim() >= 2:
                weight.mul_(20)
    return model


def ids_of(rows: int, positions: int, vocab: int = 11, seed: int = 0, least: int = 0) -> Tensor:
    return torch.randint(least, vocab, (rows, positions), generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("style", STYLES, ids=lambda style: "-".join(style.values()))
def test_a_position_depends_on_every_earlier_token_and_on_no_later_one(style: dict[str, Any]) -> None:
    model, ids = model_of(dataclasses.replace(TINY, **style)), ids_of(1, 12)
    logits = model(ids)
    for changed in range(12):
        other = ids.clone()
        other[0, changed] = (other[0, changed] + 1) % 11
        moved = (model(other) - logits).abs().amax(dim=-1)[0]
        assert torch.equal(moved[:changed], torch.zeros(changed))
        assert (moved[changed:] > 1e-6).all()


@pytest.mark.parametrize("positions", ["learned", "rotary"])
def test_a_packed_row_gives_each_document_what_it_gives_alone(positions: Any) -> None:
    model = model_of(dataclasses.replace(TINY, positions=positions))
    first, second = ids_of(1, 5, seed=1), ids_of(1, 7, seed=2)
    packed = torch.cat((first, second), dim=1)
    documents = torch.tensor([[0] * 5 + [1] * 7])
    logits = model(packed, documents)
    torch.testing.assert_close(logits[:, :5], model(first))
    torch.testing.assert_close(logits[:, 5:], model(second))
    assert not torch.allclose(model(packed)[:, 5:], model(second), atol=1e-3)


@pytest.mark.parametrize("positions", ["learned", "rotary"])
@pytest.mark.parametrize("side", ["left", "right"])
def test_padding_changes_nothing_at_real_positions(positions: Any, side: str) -> None:
    model = model_of(dataclasses.replace(TINY, positions=positions, pad_id=0))
    real, pads = ids_of(1, 6, least=1), torch.zeros(1, 4, dtype=torch.long)
    padded = torch.cat((pads, real) if side == "left" else (real, pads), dim=1)
    logits = model(padded)
    torch.testing.assert_close(logits[:, 4:] if side == "left" else logits[:, :6], model(real))
    assert logits.isfinite().all()


def test_padding_and_ignored_targets_do_not_count_in_the_loss() -> None:
    model, ids, targets = model_of(dataclasses.replace(TINY, pad_id=0)), ids_of(2, 6, least=1), ids_of(2, 6, seed=3, least=1)
    targets[0, 4:] = 0
    targets[1, 0] = -100
    logits = model(ids)
    each = [-logits[b, t].log_softmax(-1)[targets[b, t]] for b in range(2) for t in range(6) if targets[b, t] > 0]
    assert len(each) == 9
    torch.testing.assert_close(next_token_loss(model, ids, targets, pad_id=0), torch.stack(each).mean())


def test_initial_weights_follow_gpt2_and_the_first_loss_is_a_uniform_guess() -> None:
    config = Config(dim=128, num_layers=8)
    torch.manual_seed(0)
    model = Transformer(config)
    assert model.blocks[0].attention.query_key_value.weight.std().item() == pytest.approx(0.02, rel=0.05)
    assert model.blocks[7].attention.output.weight.std().item() == pytest.approx(0.02 / 4, rel=0.05)
    assert model.blocks[7].feed_forward.down.weight.std().item() == pytest.approx(0.02 / 4, rel=0.05)
    loss = next_token_loss(model, ids_of(4, 64, 65), ids_of(4, 64, 65, seed=1))
    assert loss.item() == pytest.approx(math.log(65), abs=0.1)


def test_tying_shares_the_memory() -> None:
    tied, untied = Transformer(TINY), Transformer(dataclasses.replace(TINY, tied_embeddings=False))
    assert tied.head.weight is tied.token_embedding.weight
    assert untied.head.weight is not untied.token_embedding.weight
    assert sum(p.numel() for p in untied.parameters()) - sum(p.numel() for p in tied.parameters()) == 11 * 16


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"dim": 0}, ["dim", "0", "at least 1"]),
        ({"num_layers": True}, ["num_layers", "True"]),
        ({"num_heads": 3}, ["num_heads", "3", "divisor of dim=16"]),
        ({"num_heads": 16}, ["num_heads", "16", "even"]),
        ({"ffn_dim": -1}, ["ffn_dim", "-1"]),
        ({"vocab_size": 2.5}, ["vocab_size", "2.5"]),
        ({"dropout": 1.0}, ["dropout", "1.0", "below 1"]),
        ({"dropout": math.nan}, ["dropout", "nan"]),
        ({"norm": "batchnorm"}, ["norm", "batchnorm", "layernorm, rmsnorm"]),
        ({"norm_place": "mid"}, ["norm_place", "pre, post"]),
        ({"positions": "alibi"}, ["positions", "learned, rotary"]),
        ({"activation": "tanh"}, ["activation", "gelu, gelu_tanh, swiglu, relu, relu2"]),
        ({"tied_embeddings": 1}, ["tied_embeddings", "True or False"]),
        ({"init": "zeros"}, ["init", "zeros", "gpt2, xavier"]),
        ({"rotary_base": 1.0}, ["rotary_base", "1.0", "above 1"]),
        ({"rotary_factor": 0.5}, ["rotary_factor", "0.5", "at least 1"]),
        ({"norm_eps": 0.0}, ["norm_eps", "0.0", "above 0"]),
        ({"pad_id": 11}, ["pad_id", "11", "0 to 10"]),
    ],
)
def test_an_impossible_config_is_refused_with_field_value_and_range(change: dict[str, Any], words: list[str]) -> None:
    with pytest.raises(ValueError) as refusal:
        dataclasses.replace(TINY, **change)
    assert all(word in str(refusal.value) for word in words), refusal.value


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"steps": 0}, ["steps", "0", "at least 1"]),
        ({"learning_rate": 0.0}, ["learning_rate", "above 0"]),
        ({"learning_rate": math.nan}, ["learning_rate", "nan"]),
        ({"min_learning_rate": 1.0}, ["min_learning_rate", "0.001"]),
        ({"beta2": 1.0}, ["beta2", "below 1"]),
        ({"clip": -1.0}, ["clip", "above 0"]),
    ],
)
def test_an_impossible_recipe_is_refused_with_field_value_and_range(change: dict[str, Any], words: list[str]) -> None:
    with pytest.raises(ValueError) as refusal:
        Recipe(**change)
    assert all(word in str(refusal.value) for word in words), refusal.value


def test_more_positions_than_the_context_are_refused() -> None:
    with pytest.raises(ValueError, match="context=12"):
        Transformer(TINY)(ids_of(1, 13))


@given(st.integers(0, 10_000), st.integers(0, 300), st.integers(1, 3000))
def test_the_schedule_rises_falls_and_stays_at_its_floor(step: int, warmup: int, steps: int) -> None:
    def rate(at: int) -> float:
        return learning_rate_at(at, peak=1e-3, floor=1e-4, warmup=warmup, steps=steps)

    assert 0 < rate(step) <= 1e-3
    if step + 1 < warmup:
        assert rate(step) < rate(step + 1)
    if step >= warmup:
        assert rate(step + 1) <= rate(step)
        assert rate(step) >= 1e-4 * (1 - 1e-12)
    if step >= max(steps, warmup + 1):
        assert rate(step) == pytest.approx(1e-4)
    assert rate(warmup) == 1e-3 or steps <= warmup


@given(st.text(min_size=1))
@settings(deadline=None)
def test_the_tokenizer_gives_back_every_text_and_survives_its_file(text: str) -> None:
    tokenizer = CharTokenizer("".join(sorted(set(text))))
    assert tokenizer.decode(torch.from_numpy(tokenizer.encode(text))) == text


def test_the_tokenizer_survives_its_file_and_names_the_unknown_character(tmp_path: Path) -> None:
    tokenizer = CharTokenizer("\n\r aé日\"'")
    tokenizer.save(tmp_path / "tokenizer.json")
    assert CharTokenizer.load(tmp_path / "tokenizer.json").characters == tokenizer.characters
    with pytest.raises(ValueError, match=r"'z' \(character 2\)"):
        tokenizer.encode("aaz")
    with pytest.raises(ValueError, match="-1"):
        tokenizer.decode([-1])


def test_batches_are_shifted_by_one_and_known_by_their_number() -> None:
    tokens = np.arange(500)
    stream = list(itertools.islice(data.random_batches(tokens, 8, 4, seed=3), 6))
    for ids, targets in stream:
        assert ids.shape == targets.shape == (4, 8)
        assert torch.equal(targets, ids + 1)
    later = next(data.random_batches(tokens, 8, 4, seed=3, first=5))
    assert torch.equal(later[0], stream[5][0])
    assert len({tuple(ids.flatten().tolist()) for ids, _ in stream}) == 6


def test_a_text_too_short_for_the_context_is_refused() -> None:
    with pytest.raises(ValueError, match="context=10 needs at least 11"):
        next(data.random_batches(np.arange(10), 10, 2, seed=0))


def test_decay_is_on_matrices_only_and_every_trainable_parameter_is_there_once() -> None:
    model = Transformer(TINY)
    model.position_frozen = nn.Parameter(torch.zeros(3), requires_grad=False)
    optimizer = make_adamw(model, learning_rate=1e-3, betas=(0.9, 0.99), weight_decay=0.1)
    for group in optimizer.param_groups:
        assert {parameter.dim() >= 2 for parameter in group["params"]} == {group["weight_decay"] > 0}
    held = [id(parameter) for group in optimizer.param_groups for parameter in group["params"]]
    assert sorted(held) == sorted(id(parameter) for parameter in model.parameters() if parameter.requires_grad)


def test_accumulation_over_unequal_micro_batches_is_the_gradient_of_the_joined_batch() -> None:
    ids, targets = ids_of(6, 8), ids_of(6, 8, seed=1)
    targets[:2, 3:] = -100
    joined, parts = model_of(TINY), model_of(TINY)
    next_token_loss(joined, ids, targets).backward()
    cycle = [(ids[:2], targets[:2]), (ids[2:], targets[2:])]
    shares = train.token_shares(cycle)
    assert shares == [6 / 38, 32 / 38]
    for (part_ids, part_targets), share in zip(cycle, shares):
        train.backward(next_token_loss(parts, part_ids, part_targets), share)
    for one, other in zip(joined.parameters(), parts.parameters()):
        torch.testing.assert_close(one.grad, other.grad)


def test_a_case_joins_its_micro_batches_and_applies_the_last_partial_cycle() -> None:
    def weights_after(rows_of_batches: list[range], accumulation: int) -> list[Tensor]:
        def batches(case: Case, split: str) -> Any:
            ids, targets = data.windows(case.corpus.numpy(), np.arange(6) * 40, case.config.context)
            yield from ((ids[list(rows)], targets[list(rows)]) for rows in rows_of_batches)

        model, losses = run(Case().but(batches=batches, accumulation=accumulation, eval_every=0))
        assert len(losses) == 2
        return list(model.parameters())

    joined = weights_after([range(4), range(4, 6)], accumulation=1)
    accumulated = weights_after([range(row, row + 1) for row in range(6)], accumulation=4)
    for one, other in zip(joined, accumulated):
        torch.testing.assert_close(one, other, atol=1e-5, rtol=1e-4)


def test_the_default_case_learns_and_repeats_bit_for_bit() -> None:
    model, losses = run(Case())
    assert len(losses) == 60
    assert losses[0] == pytest.approx(math.log(65), abs=0.05)
    assert sum(losses[-5:]) / 5 < 3.6
    assert model.training
    again, same = run(Case())
    assert losses == same
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), again.parameters()))


def test_every_seam_is_called_and_can_be_replaced() -> None:
    calls: list[str] = []

    def spy(name: str) -> Any:
        healthy = getattr(Case, name)

        def seam(case: Case, *rest: Any) -> Any:
            calls.append(name)
            return healthy(case, *rest)

        return seam

    names = ("build", "optimizer", "set_learning_rate", "batches", "loss", "backward", "update", "evaluate")
    spied = Case(steps=2, accumulation=2, eval_every=2).but(**{name: spy(name) for name in names})
    _, losses = run(spied)
    step = ["set_learning_rate", "loss", "backward", "loss", "backward", "update"]
    assert calls == ["build", "optimizer", "batches", *step, *step, "evaluate", "batches"]
    assert losses == run(Case(steps=2, accumulation=2, eval_every=2))[1]


def test_evaluation_is_without_dropout_and_gradients_and_leaves_training_mode_on() -> None:
    case = Case(config=dataclasses.replace(Case().config, dropout=0.5))
    model = Case.build(case)
    seen: list[tuple[bool, bool]] = []
    model.register_forward_hook(lambda module, _, __: seen.append((module.training, torch.is_grad_enabled())))
    first = Case.evaluate(case, model)
    assert first == Case.evaluate(case, model)
    assert set(seen) == {(False, False)}
    assert model.training


def test_the_shipped_corpus_is_the_text_by_65_characters() -> None:
    text = data.shipped_text()
    assert shipped_corpus().shape == (100_000,)
    assert CharTokenizer.of_text(text).decode(shipped_corpus()[:14]) == "First Citizen:"
    assert "sha256 `" + data.fingerprint(text) in (text.parent / "README.md").read_text()
