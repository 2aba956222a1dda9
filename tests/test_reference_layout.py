"""A model that only writes may lie differently in memory: its logits are what they were, or as near as float16 weights are."""

from __future__ import annotations

import pytest
import torch
from test_reference_generate import SHAPES, ids_of, transformer, written
from torch import nn

from sickbay.reference.generation.decoding import Decoding
from sickbay.reference.models import layout
from sickbay.reference.models.layout import PACKERS, HalfLinear, StripLinear, halve_weights, lay_out_for_reading

packs = pytest.mark.skipif(not PACKERS & set(torch.backends.quantized.supported_engines), reason="torch cannot pack float16 here")


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("outputs", [1, 15, 16, 33])
@pytest.mark.parametrize("rows", [1, 2, 7])
def test_strip_linear_is_linear(rows: int, outputs: int, bias: bool) -> None:
    torch.manual_seed(0)
    linear = nn.Linear(48, outputs, bias=bias)
    x = torch.randn(2, rows, 48)
    torch.testing.assert_close(StripLinear(linear)(x), linear(x))
    torch.testing.assert_close(StripLinear(linear)(x.transpose(0, 1)), linear(x.transpose(0, 1)))


@pytest.mark.parametrize("shape", SHAPES)
def test_a_model_in_strips_is_the_same_model(shape: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model, ids = transformer(**SHAPES[shape]), ids_of(2, 9)
    before = model(ids)
    monkeypatch.setattr(layout, "LEAST_IN_STRIPS", 0)
    lay_out_for_reading(model)
    assert not any(isinstance(module, nn.Linear) for module in model.modules())
    torch.testing.assert_close(model(ids), before)
    assert written(model, [ids[0], ids[1, :4]], 30, Decoding()).shape == (2, 30)


def test_only_what_no_core_holds_is_laid_out_anew() -> None:
    model = nn.ModuleDict({"small": nn.Linear(511, 512), "large": nn.Linear(512, 512), "wide": nn.Linear(512, 512).double()})
    lay_out_for_reading(model)
    assert {name: type(module) for name, module in model.items()} == {"small": nn.Linear, "large": StripLinear, "wide": nn.Linear}


@packs
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("rows", [1, 2, 7])
def test_half_linear_is_linear_with_rounded_weights_and_nothing_else_rounded(bias: bool, rows: int) -> None:
    torch.manual_seed(0)
    linear = nn.Linear(48, 33, bias=bias)
    x = torch.randn(2, rows, 48)
    exact = nn.functional.linear(x, linear.weight.half().float(), linear.bias)
    torch.testing.assert_close(HalfLinear(linear)(x), exact, atol=1e-5, rtol=1e-5)


@packs
@pytest.mark.parametrize("shape", SHAPES)
def test_a_model_of_halved_weights_is_the_model_with_its_matrices_rounded(shape: str) -> None:
    model, rounded = transformer(**SHAPES[shape]), transformer(**SHAPES[shape])
    rounded.head = nn.Linear(16, 11, bias=False)
    rounded.head.weight.data.copy_(model.head.weight)  # the embedding is looked up, not multiplied: it is not rounded
    for module in rounded.modules():
        if isinstance(module, nn.Linear):
            module.weight.data = module.weight.data.half().float()
    ids = ids_of(2, 9)
    with torch.no_grad():
        expected = rounded(ids)
        halve_weights(model)
        torch.testing.assert_close(model(ids), expected, atol=1e-4, rtol=1e-4)
        assert not any(isinstance(module, nn.Linear) for module in model.modules())
    assert written(model, [ids[0]], 30, Decoding()).shape == (1, 30)


@packs
def test_a_weight_beyond_float16_is_refused_by_name() -> None:
    model = transformer()
    model.blocks[1].get_submodule("feed_forward.down").weight.data[0, 0] = 70_000.0
    with pytest.raises(ValueError, match=r"65504.*blocks\.1\.feed_forward\.down"):
        halve_weights(model)
