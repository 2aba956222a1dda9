"""Folders of transformers' GPT-2 and Llama checkpoints, read and written: config.json, safetensors in one file or several, tokenizer.json.

Nothing is fetched and nothing is unpickled.
"""

from __future__ import annotations

import dataclasses
import json
import re
import shutil
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from sickbay.core.errors import UsageError
from sickbay.reference.models.config import Config
from sickbay.reference.models.families import gpt2, llama
from sickbay.reference.models.families.family import Family, Weight
from sickbay.reference.models.initialise import stacked
from sickbay.reference.models.model import Transformer
from sickbay.reference.saving import durable
from sickbay.reference.text import tokenizer

FAMILIES: dict[str, Family] = {family.model_type: family for family in (gpt2.FAMILY, llama.FAMILY)}
HEAD = "lm_head.weight"
ONE_FILE, INDEX = "model.safetensors", "model.safetensors.index.json"
TOKENIZER = "tokenizer.json"
SHARD_BYTES = 5_000_000_000  # transformers' own limit of a file for years: copies and downloads of it do not fail for size
SHOWN_NAMES = 3


def load(
    folder: Path,
    *,
    context: int | None = None,
    dropout: float | None = None,
    pad_id: int | None = None,
    dtype: torch.dtype = torch.float32,
) -> tuple[Transformer, Path | None]:
    """The checkpoint's model, with weights in `dtype`, in training mode, and its tokenizer.json, where it has one.

    `context`, `dropout`: None = the checkpoint's own; a shorter context makes smaller caches. `pad_id`: None = no id is padding (a
    checkpoint's own is often the end of text, which must be seen). Raises UsageError for what is damaged, missing, or beyond
    this model, with the field's or tensor's name.
    """
    fields = _fields(folder)
    family = _family(folder, fields)
    try:
        config = family.read(fields)
        own = config.context
        if context is not None and context > own:
            raise UsageError(f"context is {context}; this checkpoint knows {own} positions at most")
        config = dataclasses.replace(
            config, context=own if context is None else context, dropout=config.dropout if dropout is None else dropout, pad_id=pad_id
        )
    except (UsageError, ValueError, TypeError) as problem:
        raise UsageError(f"{folder / 'config.json'}: {problem}") from problem
    with torch.device("meta"):  # without memory and without drawing weights that are thrown away
        model = Transformer(config)
    wanted = {name: weight.shape for name, weight in model.named_parameters()}
    found = dict(_weights(folder, family, config, wanted, dtype))
    model.load_state_dict(found, strict=False, assign=True)
    if config.tied_embeddings:
        model.head.weight = model.token_embedding.weight
    path = folder / TOKENIZER
    return model, path if path.is_file() else None


def config_of(folder: Path) -> Config:
    """The shape of the checkpoint's model, no weight read. Raises UsageError as `load` does."""
    fields = _fields(folder)
    family = _family(folder, fields)
    try:
        return family.read(fields)
    except (UsageError, ValueError, TypeError) as problem:
        raise UsageError(f"{folder / 'config.json'}: {problem}") from problem


def save(model: Transformer, folder: Path, tokenizer_file: Path | None = None, shard_bytes: int = SHARD_BYTES) -> None:
    """`folder` holds a checkpoint that transformers loads, with the same logits, and `tokenizer_file` as its tokenizer.json.

    Files hold at most `shard_bytes` of weights, or one tensor. Raises OSError, and UsageError where the folder is there already or
    neither family can do what the model does, naming the field; then nothing is written.
    """
    config = model.config
    family = _family_of(model)
    if folder.exists():
        raise UsageError(f"{folder} is there already; give a new folder")
    dtype = next(model.parameters()).dtype
    end_of_text = None if tokenizer_file is None else tokenizer.load(tokenizer_file).end_of_text
    fields = {
        "model_type": family.model_type,
        "architectures": [family.architecture],
        "vocab_size": config.vocab_size,
        "tie_word_embeddings": config.tied_embeddings,
        "bos_token_id": end_of_text,
        "eos_token_id": end_of_text,
        "pad_token_id": config.pad_id,
        "dtype": str(dtype).removeprefix("torch."),
        **family.write(config),
    }
    begun = durable.begin(folder)
    (begun / "config.json").write_text(json.dumps(fields, indent=2) + "\n", encoding="utf-8")
    _write_weights(_theirs(model, family), begun, shard_bytes)
    if tokenizer_file is not None:
        shutil.copyfile(tokenizer_file, begun / TOKENIZER)
    for file in begun.iterdir():
        durable.flush(file)
    begun.rename(folder)


def _fields(folder: Path) -> dict[str, Any]:
    try:
        fields = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    except OSError as problem:
        raise UsageError(f"{folder} is no checkpoint folder: config.json: {problem.strerror}") from problem
    except ValueError as problem:
        raise UsageError(f"{folder / 'config.json'} is no JSON: {problem}") from problem
    if not isinstance(fields, dict):
        raise UsageError(f"{folder / 'config.json'} holds no settings: it must be a JSON object")
    return fields


def _family(folder: Path, fields: dict[str, Any]) -> Family:
    kind = fields.get("model_type")
    if kind not in FAMILIES:
        raise UsageError(f"{folder / 'config.json'}: model_type is {kind!r}; it must be one of {', '.join(FAMILIES)}")
    if fields.get("quantization_config") is not None:
        raise UsageError(f"{folder / 'config.json'}: quantization_config is set; give a checkpoint whose weights are not quantised")
    return FAMILIES[kind]


def _family_of(model: Transformer) -> Family:
    """The family that can do what `model` does. Raises UsageError naming what neither can."""
    config = model.config
    kind = "gpt2" if config.positions == "learned" else "llama"
    can: dict[str, tuple[Any, ...]] = {"norm_place": ("pre",), "qk_norm": (False,), "logit_softcap": (None,)}
    if kind == "gpt2":
        can |= {"norm": ("layernorm",), "activation": tuple(gpt2.ACTIVATIONS.values()), "num_kv_heads": (None, config.num_heads)}
    else:
        can |= {"norm": ("rmsnorm",), "activation": ("swiglu",)}
    for field, values in can.items():
        if getattr(config, field) not in values:
            allowed = " or ".join(dict.fromkeys(repr(value) for value in values))
            raise UsageError(
                f"a model with {config.positions} positions is saved as {kind}, which can do {field} {allowed} only; this one has "
                f"{getattr(config, field)!r}"
            )
    if not model.causal:
        raise UsageError("an encoder cannot be saved as GPT-2 or Llama: they see the past alone")
    strangers = [name for name, _ in model.named_parameters() if "lora_" in name]
    if strangers:
        raise UsageError(f"the model has adapters ({strangers[0]}, ...); merge them first")
    return FAMILIES[kind]


def _weights(
    folder: Path, family: Family, config: Config, wanted: dict[str, torch.Size], dtype: torch.dtype
) -> Iterator[tuple[str, Tensor]]:
    """Our weights by name. Raises UsageError naming tensors that are missing, left over, or of another shape."""
    get = {_bare(name, family): tensor for name, tensor in _tensors(folder)}
    table = family.weights(config)
    if not config.tied_embeddings:
        table.append(Weight("head.weight", (HEAD,)))
    expected = [name for weight in table for name in weight.theirs]
    if missing := [name for name in expected if name not in get]:
        raise UsageError(f"{folder}: {_listed(missing)} missing from the weights")
    left_over = set(get) - set(expected) - ({HEAD} if config.tied_embeddings else set())
    if strange := sorted(name for name in left_over if not re.fullmatch(family.ignored, name)):
        raise UsageError(f"{folder}: the weights hold {_listed(strange)}, for which this model has no place")
    for weight in table:
        parts = [get[name]() for name in weight.theirs]
        tensor = torch.cat([part.T if weight.transposed else part for part in parts]).to(dtype)
        if weight.ours == "position_embedding.weight":
            tensor = tensor[: config.context].clone()
        if tensor.shape != wanted[weight.ours]:
            raise UsageError(
                f"{folder}: {' + '.join(weight.theirs)} has shape {tuple(tensor.shape)} as {weight.ours}; by config.json it must be "
                f"{tuple(wanted[weight.ours])}"
            )
        yield weight.ours, tensor


def _bare(name: str, family: Family) -> str:
    """Checkpoints of a model without its head have no prefix."""
    return name.removeprefix(family.prefix)


def _tensors(folder: Path) -> Iterator[tuple[str, Callable[[], Tensor]]]:
    """Each tensor's name and a function that reads it. Raises UsageError."""
    if (folder / INDEX).is_file():
        try:
            files = sorted(set(json.loads((folder / INDEX).read_text(encoding="utf-8"))["weight_map"].values()))
        except (KeyError, AttributeError, TypeError, ValueError) as problem:
            raise UsageError(f"{folder / INDEX} is damaged: {problem!r}") from problem
    elif (folder / ONE_FILE).is_file():
        files = [ONE_FILE]
    elif pickles := sorted(folder.glob("*.bin")):
        raise UsageError(f"{pickles[0]} is a pickle, which can run code when it is read; save the model as safetensors first")
    else:
        raise UsageError(f"{folder} holds neither {ONE_FILE} nor {INDEX}: it has no weights; give the folder that save_pretrained wrote")
    for name in files:
        if Path(name).name != name:
            raise UsageError(f"{folder / INDEX} names {name!r}, which is not in the folder")
        try:
            file = safe_open(folder / name, framework="pt")
        except (SafetensorError, OSError) as problem:
            raise UsageError(f"{folder / name} cannot be read: {problem}") from problem
        names: list[str] = file.keys()  # type: ignore[no-untyped-call]
        for key in names:
            yield key, partial(file.get_tensor, key)


def _theirs(model: Transformer, family: Family) -> Iterator[tuple[str, Tensor]]:
    """Their tensors by their names, as `family` has them."""
    ours = {name: weight.detach() for name, weight in model.named_parameters()}
    for weight in family.weights(model.config):
        if weight.ours in ours:
            parts = stacked(weight.ours.replace(".bias", ".weight"), ours[weight.ours], model.config)
            tensors = parts if len(weight.theirs) > 1 else (ours[weight.ours],)
        else:
            neighbour = ours[weight.ours.replace(".bias", ".weight")]
            tensors = (neighbour.new_zeros(len(neighbour)),)
        for name, tensor in zip(weight.theirs, tensors, strict=True):
            yield family.prefix + name, tensor.T if weight.transposed else tensor
    if not model.config.tied_embeddings:
        yield HEAD, ours["head.weight"]


def _write_weights(tensors: Iterator[tuple[str, Tensor]], folder: Path, shard_bytes: int) -> None:
    """One file, or several and their index."""
    shards: list[dict[str, Tensor]] = [{}]
    held = total = 0
    for name, tensor in tensors:
        size = tensor.numel() * tensor.element_size()
        if shards[-1] and held + size > shard_bytes:
            shards.append({})
            held = 0
        shards[-1][name] = tensor
        held, total = held + size, total + size
    files = (
        [f"model-{number:05d}-of-{len(shards):05d}.safetensors" for number in range(1, len(shards) + 1)] if len(shards) > 1 else [ONE_FILE]
    )
    for file, shard in zip(files, shards):
        # transformers reads nothing whose metadata does not name the framework.
        save_file({name: tensor.contiguous() for name, tensor in shard.items()}, folder / file, metadata={"format": "pt"})
    if len(shards) > 1:
        where = {name: file for file, shard in zip(files, shards) for name in shard}
        (folder / INDEX).write_text(json.dumps({"metadata": {"total_size": total}, "weight_map": where}, indent=2) + "\n", encoding="utf-8")


def _listed(names: list[str]) -> str:
    more = len(names) - SHOWN_NAMES
    return ", ".join(names[:SHOWN_NAMES]) + (f" and {more} more" if more > 0 else "")
