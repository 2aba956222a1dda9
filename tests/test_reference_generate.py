"""Generation is the model's own forward pass: with the cache, in batches, past the context, at any seed."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from sickbay.reference.generation.decoding import Decoding
from sickbay.reference.generation.generate import generate, generate_plainly
from sickbay.reference.generation.reader import Reader
from sickbay.reference.models.cache import Cache
from sickbay.reference.models.config import Config
from sickbay.reference.models.model import Transformer

PAD = 0
SHAPES: dict[str, dict[str, Any]] = {
    "plain": {},
    "gpt2": {"norm": "layernorm", "positions": "learned", "bias": True},
    "grouped": {"num_kv_heads": 2, "qk_norm": True},
    "one key head": {"num_kv_heads": 1, "activation": "swiglu", "logit_softcap": 5.0},
    "post-norm, own head": {"norm_place": "post", "tied_embeddings": False, "activation": "relu2"},
    "padding": {"pad_id": PAD},
    "padding, learned, grouped": {"pad_id": PAD, "positions": "learned", "num_kv_heads": 2},
}


def transformer(seed: int = 0, **changes: Any) -> Transformer:
    """A tiny model whose weights are large enough for its distributions to be far from uniform."""
    torch.manual_seed(seed)
    model = Transformer(Config(**{"dim": 16, "num_layers": 2, "num_heads": 4, "vocab_size": 11, "context": 16, **changes})).eval()
    with torch.no_grad():
        for weight in model.parameters():
            if weight.dim() == 2:
                weight.mul_(8)
    return model


def ids_of(rows: int, length: int, least: int = 1, seed: int = 0) -> Tensor:
    return torch.randint(least, 11, (rows, length), generator=torch.Generator().manual_seed(seed))


def written(model: Transformer, prompts: list[Tensor], count: int, decoding: Decoding, seed: int = 0) -> Tensor:
    return torch.stack(list(generate(model, prompts, count, decoding, seed)), dim=1)


@pytest.mark.parametrize("shape", SHAPES)
@given(cuts=st.lists(st.integers(1, 15), max_size=5), padding=st.lists(st.integers(0, 6), min_size=3, max_size=3))
@settings(deadline=None, max_examples=20)
def test_the_caches_logits_are_the_full_forwards_however_the_text_is_cut_and_padded(
    shape: str, cuts: list[int], padding: list[int]
) -> None:
    model = transformer(**SHAPES[shape])
    ids = ids_of(3, 16)
    if model.config.pad_id is not None:
        for row, width in zip(ids, padding):
            row[:width] = PAD
    edges = [0, *sorted(set(cuts)), 16]
    with torch.inference_mode():
        whole = model(ids)
        cache = Cache(model.config, 3)
        parts = torch.cat([model(ids[:, begin:end], cache=cache) for begin, end in itertools.pairwise(edges)], dim=1)
    real = ids != PAD
    torch.testing.assert_close(parts[real], whole[real], atol=2e-5, rtol=2e-5)


@pytest.mark.parametrize("shape", SHAPES)
def test_rows_padded_on_the_left_without_any_padding_id_are_what_they_are_alone(shape: str) -> None:
    model = transformer(**SHAPES[shape])
    lengths = (5, 12, 1, 8)
    rows = [ids_of(1, length, seed=length)[0] for length in lengths]
    with torch.inference_mode():
        cache = Cache(model.config, 4, padding=[12 - length for length in lengths])
        joined = torch.stack([torch.cat((torch.full((12 - len(row),), 7), row)) for row in rows])
        logits = torch.cat((model(joined[:, :6], cache=cache), model(joined[:, 6:], cache=cache)), dim=1)
        for row, found in zip(rows, logits):
            torch.testing.assert_close(found[-len(row) :], model(row[None])[0], atol=2e-5, rtol=2e-5)


def test_the_cache_in_bfloat16_is_as_near_to_float32_as_the_forward_pass_in_bfloat16_is() -> None:
    exact = transformer(num_kv_heads=2)
    rounded = transformer(num_kv_heads=2).to(torch.bfloat16)
    ids = ids_of(2, 16)
    with torch.inference_mode():
        truth, whole = exact(ids), rounded(ids).float()
        cache = Cache(rounded.config, 2, dtype=torch.bfloat16)
        parts = torch.cat([rounded(ids[:, begin : begin + 4], cache=cache) for begin in range(0, 16, 4)], dim=1).float()
    assert (parts - truth).abs().max() <= 2 * (whole - truth).abs().max()
    assert (parts - truth).abs().mean() <= 1.5 * (whole - truth).abs().mean()


@pytest.mark.parametrize("shape", ["plain", "gpt2", "grouped"])
def test_the_cache_gives_the_tokens_of_the_plain_loop_also_past_the_context(shape: str) -> None:
    model = transformer(**SHAPES[shape])
    for prompt in (ids_of(1, 3)[0], ids_of(1, 16)[0], ids_of(1, 40)[0]):
        for decoding in (Decoding(temperature=0), Decoding(temperature=1.0, top_k=8), Decoding(temperature=1.0, no_repeat_ngram=3)):
            found = written(model, [prompt], 50, decoding, seed=3)[0]
            assert torch.equal(found, generate_plainly(model, prompt, 50, decoding, seed=3))


@pytest.mark.parametrize("shape", ["plain", "gpt2", "grouped", "padding"])
@given(lengths=st.lists(st.integers(1, 24), min_size=1, max_size=5), seed=st.integers(0, 1000))
@settings(deadline=None, max_examples=8)
def test_each_row_of_a_batch_is_its_own_single_run_with_its_own_seed(shape: str, lengths: list[int], seed: int) -> None:
    model = transformer(**SHAPES[shape])
    prompts = [ids_of(1, length, seed=number)[0] for number, length in enumerate(lengths)]
    decoding = Decoding(temperature=1.0, top_p=0.9, repetition_penalty=1.2, no_repeat_ngram=4)
    together = written(model, prompts, 25, decoding, seed)
    for number, prompt in enumerate(prompts):
        assert torch.equal(together[number], written(model, [prompt], 25, decoding, seed + number)[0])


def test_a_full_context_is_read_again_from_its_last_half_and_nothing_else_is_ever_read_twice() -> None:
    model = transformer(context=8)
    widths = []
    model.token_embedding.register_forward_hook(lambda module, inputs, output: widths.append(inputs[0].shape[1]))
    list(generate(model, ids_of(1, 3), 20, Decoding()))
    # 3 + 5 fill the context; then the last 4 are read again and 4 more fit.
    assert widths == [3, 1, 1, 1, 1, 1, 4, 1, 1, 1, 1, 4, 1, 1, 1, 1, 4, 1, 1, 1]


def test_a_context_of_one_position_goes_on() -> None:
    model = transformer(context=1)
    found = written(model, [ids_of(1, 3)[0], ids_of(1, 1)[0]], 6, Decoding(temperature=0))
    assert torch.equal(found[0], generate_plainly(model, ids_of(1, 3)[0], 6, Decoding(temperature=0)))


def test_the_same_seed_gives_the_same_text_and_the_mode_is_restored() -> None:
    model = transformer(dropout=0.5).train()
    prompts = [ids_of(1, 3)[0]]
    decoding = Decoding(temperature=1.0)
    assert torch.equal(written(model, prompts, 30, decoding, 1), written(model, prompts, 30, decoding, 1))
    assert not torch.equal(written(model, prompts, 30, decoding, 1), written(model, prompts, 30, decoding, 2))
    assert model.training
    stream = generate(model, prompts, 30, decoding)
    first = next(stream)
    assert torch.is_grad_enabled()
    assert not first.is_inference()  # a caller may train on what was generated
    stream.close()
    assert model.training


def test_ids_beyond_the_tokenizers_are_never_chosen() -> None:
    model = transformer()
    found = torch.stack(list(generate(model, ids_of(1, 3), 60, Decoding(temperature=5.0), vocab_size=4)))
    assert int(found.max()) < 4


@pytest.mark.parametrize("prompts", [[], [torch.tensor([1]), torch.zeros(0, dtype=torch.long)]])
def test_nothing_to_go_on_from_is_refused_and_leaves_the_model_as_it_was(prompts: list[Tensor]) -> None:
    model = transformer().train()
    with pytest.raises(ValueError, match="at least one token"):
        next(generate(model, prompts, 3, Decoding()))
    assert model.training


def test_the_caches_buffers_are_no_larger_than_what_will_be_written() -> None:
    reader = Reader(transformer(context=4096), [ids_of(1, 3)[0], ids_of(1, 5)[0]], 7)
    assert reader._cache.layers[0].keys_BGSK.shape[2] == 12


@pytest.mark.parametrize("shape", ["plain", "grouped"])
def test_rows_can_be_exchanged_copied_and_dropped_while_reading(shape: str) -> None:
    model = transformer(**SHAPES[shape])
    rows = [ids_of(1, length, seed=length)[0] for length in (4, 7, 2)]
    with torch.inference_mode():
        reader = Reader(model, rows, 20)
        reader.start()
        for order in ([2, 0, 1], [0, 0, 1, 2], [3, 1]):
            reader.select(torch.tensor(order))
            rows = [rows[number] for number in order]
            for _ in range(5):
                chosen = torch.randint(0, 11, (len(rows),))
                logits = reader.append(chosen)
                rows = [torch.cat((row, token[None])) for row, token in zip(rows, chosen)]
        for row, found, held in zip(rows, logits, reader.written_BT):
            if len(row) <= 16:
                torch.testing.assert_close(found, model(row[None])[0, -1], atol=2e-5, rtol=2e-5)
            assert torch.equal(held[held >= 0], row)
