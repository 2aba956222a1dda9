"""The encoder sees all, the encoder-decoder's target sees the source and its own past; masks and initial weights are what is said."""

from __future__ import annotations

import dataclasses
import itertools
import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from sickbay.reference.generation.decoding import Decoding
from sickbay.reference.generation.generate import generate
from sickbay.reference.models.cache import Cache
from sickbay.reference.models.config import Config
from sickbay.reference.models.encoder import Encoder
from sickbay.reference.models.encoder_decoder import EncoderDecoder
from sickbay.reference.models.model import Transformer

TINY = Config(dim=16, num_layers=2, num_heads=2, vocab_size=11, context=12)
STYLES = [
    {"norm": norm, "norm_place": place, "positions": positions, "num_kv_heads": shared, "bias": shared == 1}
    for (norm, place), positions, shared in itertools.product((("layernorm", "post"), ("rmsnorm", "pre")), ("learned", "rotary"), (None, 1))
]
KINDS = pytest.mark.parametrize("positions", ["learned", "rotary"])


def sharpened(model: nn.Module) -> Any:
    """At its initial 0.02 a tiny model's outputs hardly differ; larger weights make every dependence visible."""
    with torch.no_grad():
        for weight in model.parameters():
            if weight.dim() >= 2:
                weight.mul_(20)
    return model.eval()


def made(kind: type[nn.Module], **changes: Any) -> Any:
    torch.manual_seed(0)
    return sharpened(kind(dataclasses.replace(TINY, **changes)))


def ids_of(rows: int, positions: int, seed: int = 0, least: int = 0) -> Tensor:
    return torch.randint(least, 11, (rows, positions), generator=torch.Generator().manual_seed(seed))


def other(ids: Tensor, position: int) -> Tensor:
    changed = ids.clone()
    changed[0, position] = (changed[0, position] + 1) % 11
    return changed


def moved(before: Tensor, after: Tensor) -> list[bool]:
    """Which positions of the only row differ."""
    return ((before - after).abs().amax(dim=-1)[0] > 1e-6).tolist()


@pytest.mark.parametrize("style", STYLES, ids=lambda style: "-".join(map(str, style.values())))
def test_each_position_of_an_encoder_depends_on_every_token(style: dict[str, Any]) -> None:
    model, ids = made(Encoder, **style), ids_of(1, 12)
    logits = model(ids)
    for changed in range(12):
        assert moved(logits, model(other(ids, changed))) == [True] * 12


@KINDS
def test_a_packed_row_gives_an_encoder_what_each_document_gives_alone(positions: Any) -> None:
    model, first, second = made(Encoder, positions=positions), ids_of(1, 5, seed=1), ids_of(1, 7, seed=2)
    packed, documents = torch.cat((first, second), dim=1), torch.tensor([[0] * 5 + [1] * 7])
    logits = model(packed, documents)
    torch.testing.assert_close(logits[:, :5], model(first))
    torch.testing.assert_close(logits[:, 5:], model(second))
    assert not torch.allclose(model(packed)[:, :5], model(first), atol=1e-3)


@KINDS
@pytest.mark.parametrize("side", ["left", "right"])
def test_padding_changes_nothing_at_an_encoders_real_positions(positions: Any, side: str) -> None:
    model = made(Encoder, positions=positions, pad_id=0)
    real, pads = ids_of(1, 6, least=1), torch.zeros(1, 4, dtype=torch.long)
    logits = model(torch.cat((pads, real) if side == "left" else (real, pads), dim=1))
    torch.testing.assert_close(logits[:, 4:] if side == "left" else logits[:, :6], model(real))
    assert logits.isfinite().all()


def test_an_encoder_takes_no_cache_and_no_row_beyond_its_context() -> None:
    with pytest.raises(ValueError, match="takes no cache"):
        made(Encoder)(ids_of(1, 3), cache=Cache(TINY, 1))
    with pytest.raises(ValueError, match="context=12"):
        made(Encoder)(ids_of(1, 13))


@pytest.mark.parametrize("style", STYLES, ids=lambda style: "-".join(map(str, style.values())))
def test_a_target_depends_on_the_whole_source_and_on_its_own_past(style: dict[str, Any]) -> None:
    model, source, target = made(EncoderDecoder, **style), ids_of(1, 9), ids_of(1, 7, seed=1)
    logits = model(source, target)
    for changed in range(9):
        assert moved(logits, model(other(source, changed), target)) == [True] * 7
    for changed in range(7):
        assert moved(logits, model(source, other(target, changed))) == [False] * changed + [True] * (7 - changed)


@KINDS
def test_packed_pairs_give_what_each_pair_gives_alone(positions: Any) -> None:
    model = made(EncoderDecoder, positions=positions)
    sources, targets = [ids_of(1, n, seed=n) for n in (4, 8)], [ids_of(1, n, seed=n + 20) for n in (7, 5)]
    logits = model(
        torch.cat(sources, dim=1), torch.cat(targets, dim=1), torch.tensor([[0] * 4 + [1] * 8]), torch.tensor([[0] * 7 + [1] * 5])
    )
    torch.testing.assert_close(logits[:, :7], model(sources[0], targets[0]))
    torch.testing.assert_close(logits[:, 7:], model(sources[1], targets[1]))


@KINDS
@pytest.mark.parametrize("side", ["left", "right"])
def test_padding_of_source_and_target_changes_nothing_at_real_positions(positions: Any, side: str) -> None:
    model = made(EncoderDecoder, positions=positions, pad_id=0)
    source, target, pads = ids_of(1, 6, least=1), ids_of(1, 5, seed=3, least=1), torch.zeros(1, 4, dtype=torch.long)
    padded = [torch.cat((pads, ids) if side == "left" else (ids, pads), dim=1) for ids in (source, target)]
    logits = model(*padded)
    torch.testing.assert_close(logits[:, 4:] if side == "left" else logits[:, :5], model(source, target))
    assert logits.isfinite().all()


def test_a_source_of_padding_alone_gives_finite_logits_and_gradients() -> None:
    model = made(EncoderDecoder, pad_id=0)
    model(torch.zeros(2, 5, dtype=torch.long), ids_of(2, 4, least=1)).sum().backward()
    assert all(weight.grad is not None and weight.grad.isfinite().all() for weight in model.parameters())


@KINDS
def test_a_target_decoded_token_by_token_has_the_logits_of_the_whole(positions: Any) -> None:
    model, source, target = made(EncoderDecoder, positions=positions, num_kv_heads=1), ids_of(3, 9), ids_of(3, 7, seed=1)
    memory, cache = model.encode(source), Cache(model.config, 3)
    steps = [model.decode(target[:, n : n + 1], memory, cache=cache) for n in range(7)]
    torch.testing.assert_close(torch.cat(steps, dim=1), model(source, target), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("sources", [1, 2])
def test_what_is_generated_from_a_source_is_what_the_whole_forward_says(sources: int) -> None:
    model, source = made(EncoderDecoder, pad_id=0, tied_embeddings=False), ids_of(sources, 9)
    begins = torch.full((2, 1), 3)
    written = torch.stack(list(generate(model.given(source), begins, 6, Decoding(temperature=0))), dim=1)
    rows = begins
    for _ in range(6):
        with torch.no_grad():
            rows = torch.cat((rows, model(source.expand(2, 9), rows)[:, -1:].argmax(dim=-1)), dim=1)
    assert torch.equal(written, rows[:, 1:])
    assert sources == 1 or not torch.equal(written[0], written[1])
    assert not model.training


def test_documents_of_one_side_alone_and_a_target_beyond_the_context_are_refused() -> None:
    model = made(EncoderDecoder)
    with pytest.raises(ValueError, match="for both or for neither"):
        model(ids_of(1, 4), ids_of(1, 4), torch.zeros(1, 4, dtype=torch.long))
    with pytest.raises(ValueError, match="context=12"):
        model(ids_of(1, 4), ids_of(1, 13))


def test_every_weight_of_an_encoder_decoder_gets_a_gradient_also_untied() -> None:
    for tied in (True, False):
        model = made(EncoderDecoder, tied_embeddings=tied, bias=True, positions="learned", qk_norm=True)
        model(ids_of(2, 9), ids_of(2, 7, seed=1)).square().sum().backward()
        without = [name for name, weight in model.named_parameters() if weight.grad is None or not weight.grad.abs().sum() > 0]
        # The encoder's last norm feeds cross-attention; nothing of the encoder is left without use.
        assert without == []


def std(weight: Tensor) -> float:
    return weight.std().item()


def test_what_writes_to_the_residual_stream_is_divided_by_the_root_of_how_many_do() -> None:
    torch.manual_seed(0)
    model = EncoderDecoder(Config(dim=128, num_layers=4, vocab_size=11))
    assert std(model.encoder.blocks[3].attention.output.weight) == pytest.approx(0.02 / math.sqrt(8), rel=0.05)
    for part in (
        model.decoder.blocks[0].attention.output,
        model.decoder.blocks[3].cross_attention.output,
        model.decoder.blocks[1].feed_forward.down,
    ):
        assert std(part.weight) == pytest.approx(0.02 / math.sqrt(12), rel=0.05)
    assert std(model.decoder.blocks[0].cross_attention.key_value.weight) == pytest.approx(0.02, rel=0.05)


def test_xavier_gives_each_matrix_of_a_stack_its_own_fans() -> None:
    torch.manual_seed(0)
    model = Transformer(
        Config(dim=128, num_layers=8, num_heads=4, num_kv_heads=1, ffn_dim=256, init="xavier", bias=True, tied_embeddings=False)
    )
    stack = model.blocks[0].attention.query_key_value.weight
    assert std(stack[:128]) == pytest.approx(math.sqrt(2 / 256), rel=0.05)
    assert std(stack[128:160]) == pytest.approx(math.sqrt(2 / 160), rel=0.05)
    assert std(stack[160:]) == pytest.approx(math.sqrt(2 / 160), rel=0.05)
    assert std(model.blocks[0].feed_forward.up.weight) == pytest.approx(math.sqrt(2 / 384), rel=0.05)
    assert std(model.blocks[7].feed_forward.down.weight) == pytest.approx(math.sqrt(2 / 384) / 4, rel=0.05)
    assert std(model.token_embedding.weight) == pytest.approx(0.02, rel=0.05)
    assert std(model.head.weight) == pytest.approx(0.02, rel=0.05)
    assert not any(weight.any() for name, weight in model.named_parameters() if name.endswith("bias"))
    cross = EncoderDecoder(Config(dim=128, num_layers=1, init="xavier")).decoder.blocks[0].cross_attention
    assert std(cross.key_value.weight) == pytest.approx(math.sqrt(2 / 256), rel=0.05)
