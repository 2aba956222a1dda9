"""Checkpoints of transformers' GPT-2 and Llama have their logits here, ours have ours there, and the rest is refused by name."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from sickbay.core.errors import UsageError
from sickbay.reference.models import pretrained
from sickbay.reference.models.config import Config
from sickbay.reference.models.encoder import Encoder
from sickbay.reference.models.model import Transformer
from sickbay.reference.text.tokenizer import CharTokenizer

transformers = pytest.importorskip("transformers")

GPT2: dict[str, Any] = {"vocab_size": 53, "n_embd": 24, "n_layer": 3, "n_head": 4, "n_positions": 20, "bos_token_id": 0, "eos_token_id": 0}
LLAMA: dict[str, Any] = {
    "vocab_size": 53,
    "hidden_size": 32,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "intermediate_size": 40,
    "max_position_embeddings": 20,
}
CLOSE = {"atol": 1e-4, "rtol": 0.0}


def theirs(kind: str, **changes: Any) -> Any:
    """Their model with every weight drawn, norms and biases too: at their first values, many a mistake would not show."""
    torch.manual_seed(0)
    config = transformers.GPT2Config(**{**GPT2, **changes}) if kind == "gpt2" else transformers.LlamaConfig(**{**LLAMA, **changes})
    model = (transformers.GPT2LMHeadModel if kind == "gpt2" else transformers.LlamaForCausalLM)(config).eval()
    with torch.no_grad():
        for name, weight in model.named_parameters():
            weight.copy_(torch.randn_like(weight) * 0.3 + (1.0 if "norm" in name or "ln_" in name else 0.0))
    return model


def ids_of(rows: int = 3, positions: int = 20) -> Tensor:
    return torch.randint(53, (rows, positions), generator=torch.Generator().manual_seed(1))


def difference(ours: Transformer, their_model: Any) -> float:
    ours.eval()
    with torch.no_grad():
        logits = their_model(ids_of()).logits
        assert logits.std() > 0.5  # not all the same
        return float((ours(ids_of()) - logits).abs().max())


# Waves of eight pairs are 6 to 1,000 positions long: some are kept, some stretched, some between.
LLAMA3: dict[str, Any] = {
    "rope_type": "llama3",
    "rope_theta": 300.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 100,
}
VARIANTS = [
    ("gpt2", {}),
    ("gpt2", {"activation_function": "gelu", "n_inner": 40, "layer_norm_epsilon": 1e-3}),
    ("gpt2", {"activation_function": "relu", "tie_word_embeddings": False}),
    ("gpt2", {"activation_function": "gelu_pytorch_tanh"}),
    ("llama", {}),
    ("llama", {"num_key_value_heads": 4, "tie_word_embeddings": True}),
    ("llama", {"num_key_value_heads": 1, "attention_bias": True, "mlp_bias": True, "rms_norm_eps": 1e-3}),
    ("llama", {"rope_parameters": {"rope_type": "default", "rope_theta": 500.0}}),
    ("llama", {"hidden_size": 64, "rope_parameters": {**LLAMA3, "factor": 8.0}}),
]
ALL = pytest.mark.parametrize(
    ("kind", "changes"), VARIANTS, ids=lambda value: value if isinstance(value, str) else "-".join(value) or "plain"
)


@ALL
def test_their_checkpoint_has_their_logits_here(tmp_path: Path, kind: str, changes: dict[str, Any]) -> None:
    model = theirs(kind, **changes)
    model.save_pretrained(tmp_path)
    ours, tokenizer = pretrained.load(tmp_path)
    assert tokenizer is None
    assert ours.training
    assert difference(ours, model) < CLOSE["atol"]
    assert all(weight.requires_grad and not weight.is_meta for weight in ours.parameters())


@ALL
def test_ours_saved_again_has_the_same_logits_there(tmp_path: Path, kind: str, changes: dict[str, Any]) -> None:
    model = theirs(kind, **changes)
    model.save_pretrained(tmp_path / "theirs")
    ours, _ = pretrained.load(tmp_path / "theirs")
    pretrained.save(ours, tmp_path / "ours")
    back, report = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "ours", output_loading_info=True)
    assert not any(report[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    assert type(back) is type(model)
    assert difference(ours, back.eval()) < CLOSE["atol"]
    again, _ = pretrained.load(tmp_path / "ours")
    # The width of the feed-forward part may be written out, nothing else may change.
    assert dataclasses.replace(again.config, ffn_dim=None) == dataclasses.replace(ours.config, ffn_dim=None)
    assert again.config.hidden_dim == ours.config.hidden_dim
    assert all(torch.equal(a, b) for a, b in zip(ours.parameters(), again.parameters(), strict=True))


@pytest.mark.parametrize(
    "config",
    [
        Config(dim=24, num_layers=2, vocab_size=53, context=20, norm="layernorm", positions="learned", activation="relu2", bias=False),
        Config(
            dim=24,
            num_layers=2,
            vocab_size=53,
            context=20,
            norm="layernorm",
            positions="learned",
            bias=True,
            tied_embeddings=False,
            norm_eps=1e-4,
        ),
        Config(dim=32, num_layers=2, num_kv_heads=2, vocab_size=53, context=20, activation="swiglu", rotary_base=700.0),
        Config(dim=32, num_layers=2, vocab_size=53, context=20, activation="swiglu", bias=True, tied_embeddings=False),
    ],
    ids=["gpt2-without-biases", "gpt2-untied", "llama-shared-heads", "llama-biases"],
)
def test_a_model_born_here_has_its_logits_there(tmp_path: Path, config: Config) -> None:
    torch.manual_seed(0)
    ours = Transformer(config)
    with torch.no_grad():
        for weight in ours.parameters():
            weight.add_(torch.randn_like(weight) * 0.3)
    pretrained.save(ours, tmp_path / "ours")
    assert difference(ours, transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "ours").eval()) < CLOSE["atol"]


@pytest.mark.parametrize("kind", ["gpt2", "llama"])
def test_shards_are_read_and_written(tmp_path: Path, kind: str) -> None:
    model = theirs(kind)
    model.save_pretrained(tmp_path / "theirs", max_shard_size="20KB")
    assert len(list((tmp_path / "theirs").glob("*.safetensors"))) > 2
    ours, _ = pretrained.load(tmp_path / "theirs")
    assert difference(ours, model) < CLOSE["atol"]
    pretrained.save(ours, tmp_path / "ours", shard_bytes=20_000)
    files = sorted((tmp_path / "ours").glob("*.safetensors"))
    assert len(files) > 2
    assert all(sum(tensor.nbytes for tensor in load_file(file).values()) <= 20_000 for file in files)
    back = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "ours").eval()
    assert difference(ours, back) < CLOSE["atol"]


@pytest.mark.parametrize(("kind", "body"), [("gpt2", "transformer"), ("llama", "model")])
def test_a_checkpoint_of_the_body_alone_is_read_where_the_head_is_tied(tmp_path: Path, kind: str, body: str) -> None:
    model = theirs(kind, tie_word_embeddings=True)
    getattr(model, body).save_pretrained(tmp_path)
    ours, _ = pretrained.load(tmp_path)
    assert difference(ours, model) < CLOSE["atol"]


def test_half_precision_comes_as_float32_or_as_asked(tmp_path: Path) -> None:
    theirs("llama").to(torch.bfloat16).save_pretrained(tmp_path)
    assert {weight.dtype for weight in pretrained.load(tmp_path)[0].parameters()} == {torch.float32}
    assert {weight.dtype for weight in pretrained.load(tmp_path, dtype=torch.bfloat16)[0].parameters()} == {torch.bfloat16}


@pytest.mark.parametrize("kind", ["gpt2", "llama"])
def test_context_dropout_and_padding_can_be_chosen(tmp_path: Path, kind: str) -> None:
    model = theirs(kind)
    model.save_pretrained(tmp_path)
    ours, _ = pretrained.load(tmp_path, context=8, dropout=0.25, pad_id=5)
    assert (ours.config.context, ours.config.dropout, ours.config.pad_id) == (8, 0.25, 5)
    ids = ids_of(2, 8).masked_fill(ids_of(2, 8) == 5, 6)
    with torch.no_grad():
        torch.testing.assert_close(ours.eval()(ids), model(ids).logits, **CLOSE)
    with pytest.raises(UsageError, match="context is 21; this checkpoint knows 20"):
        pretrained.load(tmp_path, context=21)


def test_loading_draws_nothing_from_the_random_state(tmp_path: Path) -> None:
    theirs("gpt2").save_pretrained(tmp_path)
    before = torch.get_rng_state()
    pretrained.load(tmp_path)
    assert torch.equal(before, torch.get_rng_state())


def test_the_tokenizer_comes_along_both_ways(tmp_path: Path) -> None:
    tokenizer = CharTokenizer("abc")
    torch.manual_seed(0)
    model = Transformer(Config(dim=8, num_layers=1, num_heads=2, vocab_size=3, context=4, activation="swiglu"))
    tokenizer.save(tmp_path / "tokenizer.json")
    pretrained.save(model, tmp_path / "saved", tmp_path / "tokenizer.json")
    _, path = pretrained.load(tmp_path / "saved")
    assert path == tmp_path / "saved" / "tokenizer.json"
    assert path.read_bytes() == (tmp_path / "tokenizer.json").read_bytes()


@pytest.mark.parametrize(
    ("kind", "changes", "words"),
    [
        ("gpt2", {"scale_attn_by_inverse_layer_idx": True}, ["scale_attn_by_inverse_layer_idx", "True", "False only"]),
        ("gpt2", {"scale_attn_weights": False}, ["scale_attn_weights", "False"]),
        ("gpt2", {"activation_function": "mish"}, ["activation_function", "mish", "gelu_new"]),
        ("gpt2", {"attn_pdrop": 0.0}, ["attn_pdrop 0.0", "resid_pdrop 0.1"]),
        ("gpt2", {"n_embd": "wide"}, ["n_embd", "'wide'", "integer"]),
        ("gpt2", {"n_layer": None}, ["n_layer", "missing"]),
        ("gpt2", {"n_head": 5}, ["num_heads", "5", "divisor of dim=24"]),
        ("gpt2", {"n_embd": 48}, ["wte.weight", "(53, 24)", "(53, 48)"]),
        ("gpt2", {"n_layer": 2}, ["h.2.", "no place"]),
        ("gpt2", {"n_layer": 4}, ["h.3.", "missing from the weights"]),
        ("gpt2", {"model_type": "bloom"}, ["model_type", "bloom", "gpt2, llama"]),
        ("llama", {"hidden_act": "gelu"}, ["hidden_act", "gelu", "silu"]),
        ("llama", {"head_dim": 16}, ["head_dim", "16", "8"]),
        ("llama", {"mlp_bias": True}, ["mlp_bias", "True"]),
        ("llama", {"rope_parameters": {**LLAMA3, "factor": 8.0, "low_freq_factor": 2.0}}, ["rope_parameters", "low_freq_factor 1.0"]),
        ("llama", {"rope_parameters": {**LLAMA3, "factor": 0.5}}, ["rotary_factor", "0.5", "at least 1"]),
        ("llama", {"rope_parameters": {"rope_type": "yarn", "factor": 8.0}}, ["rope_parameters", "yarn", "default"]),
        ("llama", {"rope_parameters": None, "rope_scaling": {"type": "linear", "factor": 2.0}}, ["rope_scaling", "linear"]),
        ("llama", {"quantization_config": {"bits": 4}}, ["quantization_config"]),
        ("llama", {"num_attention_heads": 0}, ["num_attention_heads", "0"]),
    ],
)
def test_what_a_checkpoint_has_beyond_this_model_is_refused_by_name(
    tmp_path: Path, kind: str, changes: dict[str, Any], words: list[str]
) -> None:
    theirs(kind).save_pretrained(tmp_path)
    file = tmp_path / "config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), **changes}))
    with pytest.raises(UsageError) as refusal:
        pretrained.load(tmp_path)
    assert all(word in str(refusal.value) for word in [str(tmp_path), *words]), refusal.value


def test_stretched_waves_matter(tmp_path: Path) -> None:
    model = theirs("llama", hidden_size=64, rope_parameters={**LLAMA3, "factor": 8.0})
    model.save_pretrained(tmp_path)
    ours, _ = pretrained.load(tmp_path)
    assert (ours.config.rotary_factor, ours.config.rotary_context) == (8.0, 100)
    ours.config = dataclasses.replace(ours.config, rotary_factor=None)
    assert difference(ours, model) > 0.01


def test_old_fields_of_the_rotary_base_are_read(tmp_path: Path) -> None:
    theirs("llama").save_pretrained(tmp_path)
    file = tmp_path / "config.json"
    fields = json.loads(file.read_text())
    del fields["rope_parameters"]
    file.write_text(json.dumps({**fields, "rope_theta": 1234.0, "rope_scaling": None}))
    assert pretrained.load(tmp_path)[0].config.rotary_base == 1234.0


def test_damage_is_named(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"config\.json: No such file"):
        pretrained.load(tmp_path)
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(UsageError, match="is no JSON"):
        pretrained.load(tmp_path)
    theirs("gpt2").save_pretrained(tmp_path)
    weights = tmp_path / "model.safetensors"
    whole = weights.read_bytes()
    weights.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(UsageError, match=r"model\.safetensors cannot be read"):
        pretrained.load(tmp_path)
    weights.unlink()
    with pytest.raises(UsageError, match=r"holds neither model\.safetensors"):
        pretrained.load(tmp_path)
    (tmp_path / "pytorch_model.bin").write_bytes(b"")
    with pytest.raises(UsageError, match="is a pickle, which can run code"):
        pretrained.load(tmp_path)
    (tmp_path / "model.safetensors.index.json").write_text('{"weight_map": {"wte.weight": "../elsewhere.safetensors"}}')
    with pytest.raises(UsageError, match=r"'\.\./elsewhere\.safetensors', which is not in the folder"):
        pretrained.load(tmp_path)


def test_tensors_that_are_no_weights_are_passed_over_and_others_are_not(tmp_path: Path) -> None:
    model = theirs("gpt2")
    model.save_pretrained(tmp_path)
    weights = load_file(tmp_path / "model.safetensors")
    mask = torch.ones(1, 1, 20, 20).tril()
    save_file({**weights, "transformer.h.0.attn.bias": mask}, tmp_path / "model.safetensors")
    assert difference(pretrained.load(tmp_path)[0], model) < CLOSE["atol"]
    save_file({**weights, "score.weight": mask}, tmp_path / "model.safetensors")
    with pytest.raises(UsageError, match=r"score\.weight, for which this model has no place"):
        pretrained.load(tmp_path)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"positions": "learned"}, ["learned", "gpt2", "norm 'layernorm'", "'rmsnorm'"]),
        ({"activation": "gelu"}, ["rotary", "llama", "activation 'swiglu'", "'gelu'"]),
        ({"qk_norm": True}, ["qk_norm", "True"]),
        ({"logit_softcap": 30.0}, ["logit_softcap", "30.0"]),
        ({"norm_place": "post"}, ["norm_place", "'post'"]),
        ({"positions": "learned", "norm": "layernorm", "activation": "gelu", "num_kv_heads": 2}, ["num_kv_heads", "None or 4", "2"]),
    ],
)
def test_a_model_that_neither_family_can_do_is_not_written(tmp_path: Path, changes: dict[str, Any], words: list[str]) -> None:
    config = Config(**{"dim": 32, "num_layers": 1, "activation": "swiglu", **changes})
    with pytest.raises(UsageError) as refusal:
        pretrained.save(Transformer(config), tmp_path / "saved")
    assert all(word in str(refusal.value) for word in words), refusal.value
    assert list(tmp_path.iterdir()) == []


def test_an_encoder_and_a_folder_that_is_there_are_refused(tmp_path: Path) -> None:
    config = Config(dim=32, num_layers=1, activation="swiglu")
    with pytest.raises(UsageError, match="encoder"):
        pretrained.save(Encoder(config), tmp_path / "saved")
    with pytest.raises(UsageError, match="there already"):
        pretrained.save(Transformer(config), tmp_path)
