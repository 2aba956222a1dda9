"""Models that exist only as shapes: from a configuration, a preset, dimensions or a user's function; what a step of each would keep."""

from __future__ import annotations

import contextlib
import importlib
import inspect
import json
import os
import sys
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sickbay.core.errors import UsageError
from sickbay.core.plan import Parts
from sickbay.core.shares import Weight

# Published dimensions. GPT-2: Radford et al. 2019, table 2; Llama: Touvron et al. 2023 (arXiv 2302.13971), table 2.
PRESETS: dict[str, dict[str, Any]] = {
    "gpt2": {"model_type": "gpt2", "n_embd": 768, "n_layer": 12, "n_head": 12, "vocab_size": 50257, "n_positions": 1024},
    "gpt2-medium": {"model_type": "gpt2", "n_embd": 1024, "n_layer": 24, "n_head": 16, "vocab_size": 50257, "n_positions": 1024},
    "gpt2-large": {"model_type": "gpt2", "n_embd": 1280, "n_layer": 36, "n_head": 20, "vocab_size": 50257, "n_positions": 1024},
    "gpt2-xl": {"model_type": "gpt2", "n_embd": 1600, "n_layer": 48, "n_head": 25, "vocab_size": 50257, "n_positions": 1024},
    "llama-7b": {
        "model_type": "llama",
        "hidden_size": 4096,
        "intermediate_size": 11008,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
        "vocab_size": 32000,
        "max_position_embeddings": 2048,
    },
    "llama-13b": {
        "model_type": "llama",
        "hidden_size": 5120,
        "intermediate_size": 13824,
        "num_hidden_layers": 40,
        "num_attention_heads": 40,
        "vocab_size": 32000,
        "max_position_embeddings": 2048,
    },
}


@dataclass(frozen=True)
class Blueprint:
    """A model's numbers. `embedding`: parameters of its embedding tables and of a head as wide; `parts`: of a step of `rows` x `length`.

    `weights`: its parameters, tied ones once.
    """

    name: str
    parameters: int
    trainable: int
    embedding: int
    layers: int
    width: int
    length: int
    parts: Parts
    weights: tuple[Weight, ...] = ()


def blueprint(target: str, rows: int, length: int, optimizer: str, dimensions: dict[str, int] | None = None) -> Blueprint:
    """The blueprint of `target`: a preset, a folder with config.json, such a file, `module:function`, or "" for `dimensions`.

    `length`: positions of a row, 0 = the model's own context. Raises UsageError for what cannot be read, built or run.
    """
    if dimensions is not None:
        name, build, context = _of_dimensions(dimensions)
    elif target in PRESETS:
        name, build, context = target, *_of_config(PRESETS[target], target)
    elif Path(target).exists():
        file = Path(target) / "config.json" if Path(target).is_dir() else Path(target)
        name, build, context = str(target), *_of_config(_read(file), str(file))
    elif ":" in target:
        name, build, context = target, _of_function(target), 0
    else:
        raise UsageError(
            f"{target!r} is no preset ({', '.join(PRESETS)}), no file or folder, and no module:function; "
            "give one of these, or dimensions: --dim 512 --layers 8 --vocab 32000"
        )
    return _measure(name, build, rows, length or context, optimizer)


def _measure(name: str, build: Callable[[], Any], rows: int, length: int, optimizer: str) -> Blueprint:
    import torch
    from torch import nn

    from sickbay.exams.footprint import blocks_of, imagine_parameters, imagined, kept_by, parts_of, without_memory

    warnings.simplefilter("ignore")
    if length < 1:
        raise UsageError(f"{name} does not say how long a row is: give --length")
    try:
        with without_memory() as mode:
            made = build()
            model, given = (made[0], list(made[1:])) if isinstance(made, tuple) else (made, [])
            if not isinstance(model, nn.Module):
                raise UsageError(
                    f"{name} gave {type(model).__name__}; it must give a torch.nn.Module, or (module, *arguments of one forward)"
                )
            imagine_parameters(mode, model)
            model.train()
            ids = torch.zeros(rows, length, dtype=torch.int64)
            positional, named = _arguments(model, ids)

            def forward() -> Any:
                if given:
                    return model(*imagined(mode, given))
                output = model(*positional, **named)
                scores = output if isinstance(output, torch.Tensor) else None
                if scores is not None and scores.dim() >= 2:
                    flat = scores.reshape(-1, scores.shape[-1])
                    return scores, nn.functional.cross_entropy(flat, torch.zeros(len(flat), dtype=torch.int64))
                return output

            kept = kept_by(model, forward)
            parts = parts_of(model, kept, rows, optimizer)
            tables = {id(part.weight): part.weight for part in model.modules() if isinstance(part, nn.Embedding)}
            widest = max((weight.shape[0] for weight in tables.values()), default=0)
            heads = {id(p.weight): p.weight for p in model.modules() if isinstance(p, nn.Linear) and widest and p.weight.shape[0] == widest}
            embedding = sum(weight.numel() for weight in {**tables, **heads}.values())
            parameters = list(model.parameters())
            width = max((weight.shape[1] for weight in tables.values()), default=0)
            return Blueprint(
                name,
                sum(p.numel() for p in parameters),
                sum(p.numel() for p in parameters if p.requires_grad),
                embedding,
                len(blocks_of(model)),
                width,
                length,
                parts,
                _weights_of(model),
            )
    except UsageError:
        raise
    except Exception as problem:
        raise UsageError(
            f"{name}: the model cannot be built or run on shapes alone: {type(problem).__name__}: {problem}"[:400]
            + ("; a function may also give (module, *arguments of one forward)" if ":" in name else "")
        ) from problem


def _arguments(model: Any, ids: Any) -> tuple[list[Any], dict[str, Any]]:
    """What `model`'s forward takes where every text is `ids`: an encoder-decoder's source and target, and labels where it wants them."""
    parameters = inspect.signature(model.forward).parameters
    needed = [p for p in parameters.values() if p.default is p.empty and p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD)]
    return [ids] * max(1, len(needed)), {name: ids for name in ("decoder_input_ids", "labels") if name in parameters}


def _weights_of(model: Any) -> tuple[Weight, ...]:
    """The model's parameters with the number of the block each is in."""
    from sickbay.exams.footprint import blocks_of

    block_of = {id(parameter): number for number, (_, block) in enumerate(blocks_of(model)) for parameter in block.parameters()}
    return tuple(
        Weight(tuple(parameter.shape), parameter.element_size(), block_of.get(id(parameter)), parameter.requires_grad)
        for parameter in model.parameters()
    )


def _read(file: Path) -> dict[str, Any]:
    try:
        fields = json.loads(file.read_text(encoding="utf-8"))
    except OSError as problem:
        raise UsageError(f"{file}: cannot be read: {problem.strerror}; give a transformers config.json or its folder") from problem
    except ValueError as problem:
        raise UsageError(f"{file}: not JSON: {problem}") from problem
    if not isinstance(fields, dict) or "model_type" not in fields:
        raise UsageError(f"{file}: no transformers configuration: it has no model_type")
    return fields


def _of_config(fields: dict[str, Any], where: str) -> tuple[Callable[[], Any], int]:
    try:
        with contextlib.redirect_stderr(None):
            import transformers
    except ImportError as problem:
        raise UsageError(
            f"{where} needs transformers, which is not installed: give dimensions instead (--dim, --layers, --vocab)"
        ) from problem
    import logging

    from sickbay.checklist.transformers_model import auto_class

    logging.getLogger("transformers").setLevel(logging.ERROR)
    fields = dict(fields)
    kind = fields.pop("model_type")
    try:
        config = transformers.AutoConfig.for_model(kind, **fields)
    except Exception as problem:
        raise UsageError(f"{where}: model_type {kind!r} cannot be read: {problem}"[:300]) from problem
    context = next((int(getattr(config, n)) for n in ("max_position_embeddings", "n_positions") if getattr(config, n, None)), 0)
    config.use_cache = False
    build: Any = auto_class(transformers, config).from_config
    return (lambda: build(config)), context


def _of_function(target: str) -> Callable[[], Any]:
    module_name, _, function_name = target.partition(":")
    here = os.getcwd()
    if here not in sys.path:
        sys.path.insert(0, here)
    try:
        module = importlib.import_module(module_name)
    except Exception as problem:
        raise UsageError(f"{module_name} cannot be imported: {type(problem).__name__}: {problem}"[:300]) from problem
    function = getattr(module, function_name, None)
    if not callable(function):
        names = ", ".join(sorted(name for name, value in vars(module).items() if callable(value) and not name.startswith("_"))[:8])
        raise UsageError(f"{module_name} has no function {function_name!r}; it has {names or 'none'}")
    return lambda: function()


def _of_dimensions(given: dict[str, int]) -> tuple[str, Callable[[], Any], int]:
    from sickbay.reference.models.config import Config
    from sickbay.reference.models.model import Transformer

    dim = given["dim"]
    fields: dict[str, Any] = {
        "dim": dim,
        "num_layers": given.get("layers", 6),
        "num_heads": given.get("heads") or max(1, dim // 64),
        "ffn_dim": given.get("ffn") or 4 * dim,
        "vocab_size": given.get("vocab", 32000),
        "context": given.get("context", 512),
    }
    try:
        config = Config(**fields)
    except ValueError as problem:
        raise UsageError(str(problem)) from problem
    name = f"decoder of {config.num_layers} layers, width {config.dim}, {config.num_heads} heads, vocabulary {config.vocab_size:,}"
    return name, (lambda: Transformer(config)), config.context
