"""Decoder, encoder and encoder-decoder learn from the shipped text, start from other weights, and pass under sickbay's eyes."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from running import ROOT, report, run, sickbay
from torch import nn
from torch.nn import functional

from sickbay.reference.case import shipped_corpus
from sickbay.reference.data import random_batches
from sickbay.reference.data.objectives import MaskedToken, NextToken, SpanCorruption
from sickbay.reference.models import lora, pretrained
from sickbay.reference.models.config import Config
from sickbay.reference.models.encoder import Encoder
from sickbay.reference.models.encoder_decoder import EncoderDecoder
from sickbay.reference.models.freeze import freeze
from sickbay.reference.models.model import Transformer

CHARACTERS, CONTEXT, STEPS = 65, 32, 60
KINDS: dict[str, tuple[Callable[[Config], nn.Module], Any]] = {
    "decoder": (Transformer, NextToken()),
    "encoder": (Encoder, MaskedToken(CHARACTERS)),
    "encoder-decoder": (EncoderDecoder, SpanCorruption(CHARACTERS, sentinels=4)),
}


def shape(objective: Any, **changes: Any) -> Config:
    return Config(dim=32, num_layers=2, num_heads=4, context=CONTEXT, vocab_size=CHARACTERS + objective.extra_ids, **changes)


def losses(model: nn.Module, objective: Any, steps: int = STEPS, begin: int = 0) -> list[float]:
    """Of each of `steps` steps of AdamW on the text from character `begin` on."""
    optimizer = torch.optim.AdamW([weight for weight in model.parameters() if weight.requires_grad], lr=5e-3)
    found = []
    for step, (rows, _) in enumerate(itertools.islice(random_batches(shipped_corpus().numpy()[begin:], CONTEXT, 16, seed=0), steps)):
        inputs, targets = objective(rows, step)
        loss = functional.cross_entropy(model(*inputs).flatten(0, 1), targets.flatten())
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        found.append(loss.item())
    return found


@pytest.mark.parametrize("init", ["gpt2", "xavier"])
@pytest.mark.parametrize("kind", KINDS)
def test_each_kind_starts_at_a_uniform_guess_and_learns(kind: str, init: Any) -> None:
    make, objective = KINDS[kind]
    torch.manual_seed(0)
    config = shape(objective, init=init)
    found = losses(make(config), objective)
    assert found[0] == pytest.approx(torch.tensor(config.vocab_size).log().item(), abs=0.2)
    assert sum(found[-10:]) / 10 < found[0] - 0.75


@pytest.mark.parametrize("way", ["low-rank", "frozen"])
def test_a_saved_model_is_tuned_from_where_it_was(way: str, tmp_path: Path) -> None:
    objective = NextToken()
    torch.manual_seed(0)
    model = Transformer(shape(objective, activation="swiglu"))
    before = losses(model, objective)
    pretrained.save(model, tmp_path / "saved")
    tuned, _ = pretrained.load(tmp_path / "saved")
    if way == "low-rank":
        lora.apply(tuned, rank=4, alpha=8)
    else:
        freeze(tuned, ["token_embedding", "blocks.0"])
    after = losses(tuned, objective, steps=30, begin=50_000)
    assert after[0] < before[0] - 1
    assert sum(after[-10:]) < sum(after[:10])


@pytest.mark.slow
@pytest.mark.parametrize("name", ["encoder", "encoder_decoder"])
def test_nothing_is_found_in_the_examples(name: str, tmp_path: Path) -> None:
    """What may be said of so short a run is that it was short."""
    script = ROOT / "examples" / f"{name}.py"
    outcome = run(sickbay("run", "--max-steps", "25", "--out", str(tmp_path / "run"), str(script)), tmp_path)
    assert outcome.code == 0, outcome.stderr.decode()
    found = report(tmp_path)
    assert found["verdict"] == "healthy", found["diagnoses"]
    assert {diagnosis["condition"] for diagnosis in found["diagnoses"]} <= {"undertrained-model"}
