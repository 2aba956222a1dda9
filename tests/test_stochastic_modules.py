"""Which parts of a model act differently in training: those that call a dropout function themselves are among them."""

from __future__ import annotations

import pytest
from torch import nn

from sickbay.patient import stochastic_modules


def test_dropout_modules_with_a_probability() -> None:
    assert [name for name, _ in stochastic_modules(nn.Sequential(nn.Dropout(0.1), nn.Dropout(0.0), nn.BatchNorm1d(3)))] == ["0", "2"]
    assert not stochastic_modules(nn.Transformer(8, 2, 1, 1, 8, dropout=0.0, batch_first=True))


@pytest.mark.parametrize(("dropout", "count"), [(0.1, 2), (0.0, 0)])
def test_a_librarys_attention_that_drops_by_function(dropout: float, count: int) -> None:
    transformers = pytest.importorskip("transformers")
    sizes = {"hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 2, "num_attention_heads": 2, "vocab_size": 16}
    assert len(stochastic_modules(transformers.LlamaForCausalLM(transformers.LlamaConfig(attention_dropout=dropout, **sizes)))) == count
