"""An encoder and an encoder-decoder are saved, resumed and recomputed as a decoder is, and are never taken for one."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import recomputing
import torch
from torch import Tensor
from torch.nn import functional

from sickbay.reference.data.objectives import MaskedToken, SpanCorruption
from sickbay.reference.models.config import Config
from sickbay.reference.models.encoder import Encoder
from sickbay.reference.models.encoder_decoder import EncoderDecoder
from sickbay.reference.models.kinds import Model, kind_of
from sickbay.reference.models.model import Transformer
from sickbay.reference.saving import checkpoint, random_states
from sickbay.reference.settings.recipe import Recipe
from sickbay.reference.text.tokenizer import CharTokenizer
from sickbay.reference.training.optimizer import make_optimizer

IDS, CONTEXT = 11, 24
OBJECTIVES: dict[str, Any] = {"encoder": MaskedToken(IDS), "encoder-decoder": SpanCorruption(IDS, sentinels=8)}
CLASSES: dict[str, Any] = {"encoder": Encoder, "encoder-decoder": EncoderDecoder}
KINDS = pytest.mark.parametrize("kind", list(OBJECTIVES))


def config_of(kind: str) -> Config:
    size = IDS + OBJECTIVES[kind].extra_ids
    return Config(dim=16, num_layers=4, num_heads=2, vocab_size=size, context=CONTEXT, dropout=0.2)


def model_of(kind: str) -> Any:
    torch.manual_seed(0)
    return CLASSES[kind](config_of(kind))


def loss_of(model: Any, kind: str, step: int) -> Tensor:
    rows = torch.randint(IDS, (3, CONTEXT), generator=torch.Generator().manual_seed(step))
    inputs, targets = OBJECTIVES[kind](rows, step)
    logits = model(*inputs)
    return functional.cross_entropy(logits.flatten(0, 1), targets.flatten())


def trained(model: Any, optimizer: torch.optim.Optimizer, kind: str, first: int, last: int) -> list[float]:
    losses = []
    for step in range(first, last):
        loss = loss_of(model, kind, step)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return losses


def saved(folder: Path, model: Model, optimizer: torch.optim.Optimizer, step: int) -> checkpoint.State:
    made = checkpoint.save(
        folder, step=step, model=model, optimizer=optimizer, recipe={}, source="", tokenizer=CharTokenizer("abcdefghijk")
    )
    return checkpoint.read(made)


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
@KINDS
def test_a_resumed_training_is_bit_equal(kind: str, optimizer: Any, tmp_path: Path) -> None:
    recipe = Recipe(optimizer=optimizer)
    random_states.seed(3)
    whole = model_of(kind)
    its_optimizer = make_optimizer(whole, recipe)
    trained(whole, its_optimizer, kind, 0, 3)
    state = saved(tmp_path, whole, its_optimizer, 3)
    expected = trained(whole, its_optimizer, kind, 3, 6)

    assert state.kind == kind
    resumed = checkpoint.load_model(state).train()
    assert type(resumed) is CLASSES[kind]
    again = make_optimizer(resumed, recipe)
    checkpoint.restore(state, resumed, again)
    assert trained(resumed, again, kind, 3, 6) == expected
    assert all(torch.equal(*pair) for pair in zip(whole.parameters(), resumed.parameters(), strict=True))


@KINDS
def test_none_is_taken_for_a_decoder(kind: str, tmp_path: Path) -> None:
    model = model_of(kind)
    state = saved(tmp_path, model, make_optimizer(model, Recipe()), 1)
    with pytest.raises(ValueError, match=f"is of kind {kind}, which writes no text by itself"):
        checkpoint.load_weights(state)
    with pytest.raises(ValueError, match=f"is of kind {kind}; this one is of kind decoder"):
        checkpoint.restore_weights(state, Transformer(config_of(kind)))


def test_each_kind_has_its_name() -> None:
    assert [kind_of(model_of(kind)) for kind in OBJECTIVES] == list(OBJECTIVES)
    assert kind_of(Transformer(config_of("encoder"))) == "decoder"


def gradients(kind: str, how: Any) -> tuple[list[Tensor], int]:
    return recomputing.gradients(model_of(kind), how, lambda model: loss_of(model, kind, 0))


@pytest.mark.parametrize("how", ["block", "sqrt"])
@KINDS
def test_recomputed_gradients_are_bit_equal_with_dropout_and_less_is_kept(kind: str, how: str) -> None:
    (plain, everything), (again, little) = gradients(kind, "none"), gradients(kind, how)
    assert len(plain) == len(again) == len(list(model_of(kind).parameters()))
    assert all(torch.equal(*pair) for pair in zip(plain, again))
    assert little < everything / 2
