"""Settings under one name: `sickbay train TEXT --preset small`. What a preset leaves out has its default."""

from __future__ import annotations

from typing import Any

Preset = dict[str, dict[str, Any]]

PRESETS: dict[str, Preset] = {
    # nanoGPT's recipe for a CPU, which the defaults are: 0.8 M parameters, minutes.
    "tiny": {},
    # nanoGPT's recipe for characters on one GPU: 10 M parameters.
    "small": {
        "model": {"dim": 384, "num_layers": 6, "num_heads": 6, "context": 256, "dropout": 0.2},
        "recipe": {"batch_size": 64, "steps": 5000, "eval_rows": 640},
    },
    # Llama's parts at 25 M parameters with a byte-pair vocabulary: one GPU, hours.
    "base": {
        "model": {
            "dim": 512,
            "num_layers": 8,
            "num_heads": 8,
            "num_kv_heads": 4,
            "ffn_dim": 1536,
            "context": 512,
            "activation": "swiglu",
            "qk_norm": True,
        },
        "recipe": {
            "batch_size": 32,
            "steps": 20_000,
            "warmup": 500,
            "learning_rate": 6e-4,
            "beta2": 0.95,
            "eval_every": 1000,
            "save_every": 1000,
        },
        "data": {"tokenizer": "bpe"},
    },
    # GPT-2's smallest (Radford et al. 2019), trained as nanoGPT does: 124 M parameters at its own vocabulary, a machine of GPUs, days.
    "gpt2": {
        "model": {
            "dim": 768,
            "num_layers": 12,
            "num_heads": 12,
            "context": 1024,
            "norm": "layernorm",
            "positions": "learned",
            "activation": "gelu_tanh",
            "bias": True,
        },
        "recipe": {
            "batch_size": 12,
            "accumulation": 40,
            "steps": 600_000,
            "warmup": 2000,
            "learning_rate": 6e-4,
            "beta2": 0.95,
            "eval_every": 1000,
            "save_every": 1000,
        },
        "data": {"tokenizer": "bpe", "bpe_vocab": 50_257},
    },
    # The lowest loss found for the model and the minutes of "tiny" on a CPU.
    "best": {
        "model": {"activation": "relu2", "qk_norm": True, "zero_outputs": True, "tied_embeddings": False},
        "recipe": {
            "optimizer": "muon",
            "learning_rate": 6e-3,
            "min_learning_rate": 0.0,
            "matrix_learning_rate": 0.02,
            "schedule": "linear",
            "warmup": 40,
            "beta2": 0.95,
            "weight_decay": 0.0,
            "batch_size": 16,
            "steps": 1150,
        },
        "data": {"order": "shuffled"},
    },
    # The shape and the steps of "tiny" for an encoder that fills in masked tokens, and for an encoder-decoder that writes what was cut out.
    "encoder": {"recipe": {"objective": "masked-token"}},
    "seq2seq": {"recipe": {"objective": "span-corruption"}},
}
