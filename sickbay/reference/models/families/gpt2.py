"""GPT-2 (Radford et al. 2019) as transformers writes it. Its linear layers are "Conv1D": weights `(inputs, outputs)`."""

from __future__ import annotations

from typing import Any, cast

from sickbay.core.errors import UsageError
from sickbay.reference.models.config import Activation, Config
from sickbay.reference.models.families.family import Family, Fields, Weight, count, demand_only

# "gelu_new" is how OpenAI's code spelt the tanh approximation; both names are in use.
ACTIVATIONS = {"gelu_new": "gelu_tanh", "gelu_pytorch_tanh": "gelu_tanh", "gelu": "gelu", "relu": "relu", "relu2": "relu2"}


def read(fields: Fields) -> Config:
    demand_only(
        fields,
        {
            "activation_function": tuple(ACTIVATIONS),
            "scale_attn_weights": (True,),
            "scale_attn_by_inverse_layer_idx": (False,),
            "add_cross_attention": (False,),
        },
    )
    dropouts = {field: fields.get(field, 0.1) for field in ("resid_pdrop", "embd_pdrop", "attn_pdrop")}
    if len(set(dropouts.values())) > 1:
        shares = ", ".join(f"{field} {share}" for field, share in dropouts.items())
        raise UsageError(f"there is one dropout here, not three ({shares}); give them the same value")
    return Config(
        dim=count(fields, "n_embd"),
        num_layers=count(fields, "n_layer"),
        num_heads=count(fields, "n_head"),
        ffn_dim=fields.get("n_inner"),
        vocab_size=count(fields, "vocab_size"),
        context=count(fields, "n_positions"),
        dropout=dropouts["resid_pdrop"],
        norm="layernorm",
        norm_eps=fields.get("layer_norm_epsilon", 1e-5),
        positions="learned",
        activation=cast("Activation", ACTIVATIONS[fields.get("activation_function", "gelu_new")]),
        bias=True,
        tied_embeddings=fields.get("tie_word_embeddings", True),
    )


def write(config: Config) -> dict[str, Any]:
    theirs = {ours: name for name, ours in reversed(ACTIVATIONS.items())}
    return {
        "n_embd": config.dim,
        "n_layer": config.num_layers,
        "n_head": config.num_heads,
        "n_inner": config.ffn_dim,
        "n_positions": config.context,
        "activation_function": theirs[config.activation],
        "layer_norm_epsilon": config.norm_eps,
        **dict.fromkeys(("resid_pdrop", "embd_pdrop", "attn_pdrop"), config.dropout),
    }


def weights(config: Config) -> list[Weight]:
    """Biases stand in a GPT-2 checkpoint always: those of a model without are zeros."""
    found = [Weight("token_embedding.weight", ("wte.weight",)), Weight("position_embedding.weight", ("wpe.weight",))]
    for layer in range(config.num_layers):
        ours, theirs = f"blocks.{layer}", f"h.{layer}"
        for our_name, their_name, transposed in (
            ("attention_norm", "ln_1", False),
            ("attention.query_key_value", "attn.c_attn", True),
            ("attention.output", "attn.c_proj", True),
            ("feed_forward_norm", "ln_2", False),
            ("feed_forward.up", "mlp.c_fc", True),
            ("feed_forward.down", "mlp.c_proj", True),
        ):
            found.append(Weight(f"{ours}.{our_name}.weight", (f"{theirs}.{their_name}.weight",), transposed))
            found.append(Weight(f"{ours}.{our_name}.bias", (f"{theirs}.{their_name}.bias",)))
    return [*found, Weight("final_norm.weight", ("ln_f.weight",)), Weight("final_norm.bias", ("ln_f.bias",))]


FAMILY = Family("gpt2", "GPT2LMHeadModel", "transformer.", r"h\.\d+\.attn\.(bias|masked_bias)", read, write, weights)
