"""Llama (Touvron et al. 2023) as transformers writes it. Its rotary pairs are ours: (k, k + K/2)."""

from __future__ import annotations

from typing import Any

from sickbay.core.errors import UsageError
from sickbay.reference.models.blocks import FAST_TURNS, SLOW_TURNS
from sickbay.reference.models.config import Config
from sickbay.reference.models.families.family import Family, Fields, Weight, count, demand_only


def read(fields: Fields) -> Config:
    demand_only(fields, {"hidden_act": ("silu", "swish")})
    dim, heads = count(fields, "hidden_size"), count(fields, "num_attention_heads")
    demand_only(fields, {"head_dim": (None, dim // heads)})
    bias = fields.get("attention_bias", False)
    demand_only({"mlp_bias": fields.get("mlp_bias", False)}, {"mlp_bias": (bias,)})
    return Config(
        dim=dim,
        num_layers=count(fields, "num_hidden_layers"),
        num_heads=heads,
        num_kv_heads=fields.get("num_key_value_heads"),
        ffn_dim=count(fields, "intermediate_size"),
        vocab_size=count(fields, "vocab_size"),
        context=count(fields, "max_position_embeddings"),
        dropout=fields.get("attention_dropout") or 0.0,
        norm="rmsnorm",
        norm_eps=fields.get("rms_norm_eps", 1e-6),
        positions="rotary",
        **rotary(fields),
        activation="swiglu",
        bias=bias,
        tied_embeddings=fields.get("tie_word_embeddings", False),
    )


def rotary(fields: Fields) -> dict[str, Any]:
    """Our rotary fields, wherever this version of transformers put theirs. Raises UsageError for angles that this model cannot do."""
    place = "rope_parameters" if fields.get("rope_parameters") else "rope_scaling"
    theirs = fields.get(place) or {}
    base = theirs.get("rope_theta") or fields.get("rope_theta") or 10_000.0
    kind = theirs.get("rope_type", theirs.get("type", "default"))
    if theirs.get("partial_rotary_factor", 1.0) != 1.0:
        raise UsageError(f"{place} is {theirs!r}; this model turns whole heads only")
    if kind == "default":
        return {"rotary_base": float(base)}
    turns = (theirs.get("low_freq_factor"), theirs.get("high_freq_factor"))
    if kind != "llama3" or turns != (SLOW_TURNS, FAST_TURNS):
        can = f"rope_type 'default', or 'llama3' with low_freq_factor {SLOW_TURNS} and high_freq_factor {FAST_TURNS}"
        raise UsageError(f"{place} is {theirs!r}; this model can do {can} only")
    return {
        "rotary_base": float(base),
        "rotary_factor": theirs.get("factor"),
        "rotary_context": count(theirs, "original_max_position_embeddings"),
    }


def rope_parameters(config: Config) -> dict[str, Any]:
    if config.rotary_factor is None:
        return {"rope_type": "default", "rope_theta": config.rotary_base}
    return {
        "rope_type": "llama3",
        "rope_theta": config.rotary_base,
        "factor": config.rotary_factor,
        "low_freq_factor": SLOW_TURNS,
        "high_freq_factor": FAST_TURNS,
        "original_max_position_embeddings": config.rotary_context,
    }


def write(config: Config) -> dict[str, Any]:
    return {
        "hidden_size": config.dim,
        "num_hidden_layers": config.num_layers,
        "num_attention_heads": config.num_heads,
        "num_key_value_heads": config.kv_heads,
        "head_dim": config.head_dim,
        "intermediate_size": config.hidden_dim,
        "max_position_embeddings": config.context,
        "hidden_act": "silu",
        "rms_norm_eps": config.norm_eps,
        # Twice: transformers reads the first since version 5, and the others before.
        "rope_parameters": rope_parameters(config),
        "rope_theta": config.rotary_base,
        "rope_scaling": None if config.rotary_factor is None else rope_parameters(config),
        "attention_bias": config.bias,
        "mlp_bias": config.bias,
        "attention_dropout": config.dropout,
    }


def weights(config: Config) -> list[Weight]:
    found = [Weight("token_embedding.weight", ("embed_tokens.weight",))]
    for layer in range(config.num_layers):
        ours, theirs = f"blocks.{layer}", f"layers.{layer}"
        found.append(Weight(f"{ours}.attention_norm.weight", (f"{theirs}.input_layernorm.weight",)))
        found.append(Weight(f"{ours}.feed_forward_norm.weight", (f"{theirs}.post_attention_layernorm.weight",)))
        for our_name, their_names in (
            ("attention.query_key_value", ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj")),
            ("attention.output", ("self_attn.o_proj",)),
            ("feed_forward.gate", ("mlp.gate_proj",)),
            ("feed_forward.up", ("mlp.up_proj",)),
            ("feed_forward.down", ("mlp.down_proj",)),
        ):
            for kind in ("weight", "bias") if config.bias else ("weight",):
                found.append(Weight(f"{ours}.{our_name}.{kind}", tuple(f"{theirs}.{name}.{kind}" for name in their_names)))
    return [*found, Weight("final_norm.weight", ("norm.weight",))]


FAMILY = Family("llama", "LlamaForCausalLM", "model.", r"layers\.\d+\.self_attn\.rotary_emb\.inv_freq", read, write, weights)
