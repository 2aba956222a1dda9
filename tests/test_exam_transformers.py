"""The same questions put to transformers' own models: the loss inside, masks built from ids, decoders fed by shifted labels."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from exam_models import Answers, V, answers, padded, patient_of, text

transformers = pytest.importorskip("transformers")
SMALL = {"vocab_size": V, "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 32}


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


def model(name: str) -> Any:
    if name == "gpt2":
        ends = {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
        return transformers.GPT2LMHeadModel(transformers.GPT2Config(vocab_size=V, n_positions=32, n_embd=16, n_layer=2, n_head=2, **ends))
    if name == "llama":
        return transformers.LlamaForCausalLM(transformers.LlamaConfig(**SMALL, num_key_value_heads=1, max_position_embeddings=32))
    if name == "bert":
        return transformers.BertForMaskedLM(transformers.BertConfig(**SMALL, max_position_embeddings=32))
    sizes = {"vocab_size": V, "d_model": 16, "d_kv": 8, "d_ff": 32, "num_layers": 2, "num_heads": 2}
    return transformers.T5ForConditionalGeneration(transformers.T5Config(**sizes, decoder_start_token_id=0, pad_token_id=0))


def examined(name: str, **batch: torch.Tensor) -> Answers:
    patient, output = patient_of(model(name).train(), **batch)
    return answers(patient, output.loss)


@pytest.mark.parametrize("name", ["gpt2", "llama"])
def test_a_decoder_with_labels_shifted_inside(name: str) -> None:
    ids, _ = text()
    found = examined(name, input_ids=ids, labels=ids.clone())
    assert found["target_offset"] == 1
    assert found["future_influence"] == found["past_blocked"] == found["row_influence"] == 0
    assert found.note("past_blocked")["nearest_blocked"] is False


def test_labels_shifted_twice() -> None:
    ids, targets = text()
    assert examined("gpt2", input_ids=ids, labels=targets)["target_offset"] == 2


@pytest.mark.parametrize("graded", [False, True])
def test_padding_in_the_labels(graded: bool) -> None:
    ids, real = padded()
    labels = ids.clone() if graded else ids.masked_fill(real == 0, -100)
    found = examined("gpt2", input_ids=ids, attention_mask=real, labels=labels)
    assert (found["padding_counted"] > 0.1) is graded
    assert found["padding_influence"] == 0


@pytest.mark.parametrize("masked", [True, False])
def test_an_encoder_reads_padding_unless_told(masked: bool) -> None:
    ids, real = padded()
    picked = (torch.rand(ids.shape) < 0.3) & (real == 1)
    batch = {"input_ids": ids.masked_fill(picked, 1), "labels": ids.masked_fill(~picked, -100)}
    found = examined("bert", **batch, **({"attention_mask": real} if masked else {}))
    assert found["target_offset"] == -1 and "future_influence" not in found
    assert (found["padding_influence"] > 1e-4) is not masked
    if masked:
        assert found["padding_influence"] == 0


@pytest.mark.parametrize("shifted", [True, False])
@pytest.mark.parametrize("masked", [True, False])
def test_an_encoder_decoder(shifted: bool, masked: bool) -> None:
    source, real = padded(10, 14)
    ids, kept = padded(10, 11)
    batch = {"input_ids": source, "labels": ids.masked_fill(kept == 0, -100)}
    if masked:
        batch["attention_mask"] = real
    if not shifted:
        batch["decoder_input_ids"] = ids
    found = examined("t5", **batch)
    assert found["target_offset"] == (1 if shifted else 0)
    assert found.note("target_offset")["causal"] is True
    assert (found["padding_influence"] > 0.001) is not masked
    assert found["row_influence"] == 0
