"""Settings of a model are tried one by one on fresh copies: those that are read show, those that are not do not."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import torch
from charts import chart
from torch import nn
from verdicts import ask, found, read, unexamined

from sickbay.exams import settings
from sickbay.patient import ForwardCall


class Gated(nn.Module):
    """Reads `dropout`, and `heads` only if it is asked to."""

    def __init__(self, config: Any) -> None:
        super().__init__()
        self.config = config
        self.heads = config.num_heads if config.honest else 2
        self.up, self.drop = nn.Linear(8, 8), nn.Dropout(config.dropout)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        parts = self.drop(self.up(x)).view(len(x), self.heads, -1)
        mixed: torch.Tensor = (parts.softmax(-1) * parts).flatten(1)
        return mixed


def answer(honest: bool) -> list[dict[str, Any]] | str:
    model = Gated(SimpleNamespace(num_heads=4, dropout=0.2, honest=honest))
    held = settings.configuration(model)
    assert held is not None and held[0] == "config"
    call = ForwardCall(model, (torch.randn(3, 8),), {}, True, True, torch.get_rng_state(), "train.py:1")
    return settings.compare(call, held, list(settings.changes(held[1])))


def test_settings_that_are_read_change_the_output_and_others_do_not() -> None:
    wired, loose = answer(True), answer(False)
    assert not isinstance(wired, str) and not isinstance(loose, str)
    assert {trial["name"]: trial["changed"] for trial in wired} == {"num_heads": 1.0, "dropout": 1.0}
    assert {trial["name"]: trial["changed"] for trial in loose} == {"num_heads": 0.0, "dropout": 1.0}


def test_only_settings_that_are_on_and_of_the_model_are_tried() -> None:
    config = {
        "n_head": 4,
        "dropout": 0.0,
        "use_rope": True,
        "bias": False,
        "drop_last": True,
        "word_dropout": 0.1,
        "lr": 0.1,
        "attn_pdrop": 0.1,
    }
    assert [name for name, _, _ in settings.changes(config)] == ["n_head", "use_rope", "attn_pdrop"]


def test_a_library_s_class_and_a_class_of_many_arguments_are_not_built_anew() -> None:
    class Two(nn.Module):
        def __init__(self, config: Any, other: int) -> None:
            super().__init__()
            self.config = config

    assert settings.configuration(nn.Linear(2, 2)) is None
    assert settings.configuration(Two(SimpleNamespace(num_heads=2), 1)) is None


def test_the_verdict_names_every_setting() -> None:
    readings = [read("setting_effect", 0.0, where="n_head", was=4, tried="2 or 1"), read("setting_effect", 1.0, where="dropout")]
    assert (
        "n_head has no effect: n_head 4 changed to 2 or 1"
        in found("setting-without-effect", chart(setting_effect=readings), "warning").summary
    )
    assert ask("setting-without-effect", chart(setting_effect=readings[1:])) is None
    assert "no model with a configuration" in unexamined("setting-without-effect", chart(loss=[1.0]))
