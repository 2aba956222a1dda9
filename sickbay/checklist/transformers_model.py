"""A transformers model's folder or config as a target: built from the config (with its weights, if they are there), fed with a text."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from sickbay.checklist.target import MOST_BATCHES, Target, of_parts
from sickbay.core.errors import UsageError

ROWS = 8
LONGEST = 128  # positions of a row
MASKED = 0.15  # share of tokens hidden from a masked model: Devlin et al. 2019
_WEIGHTS = ("model.safetensors", "model.safetensors.index.json", "pytorch_model.bin", "pytorch_model.bin.index.json")
_TOKENIZERS = ("tokenizer.json", "tokenizer.model", "vocab.json", "vocab.txt", "spiece.model")


def of_folder(path: Path, text: Path | None) -> Target:
    """The model of `path` (a folder or a config.json) on rows of `text`, with its own loss. Raises UsageError."""
    try:
        import transformers
    except ImportError:
        raise UsageError("a transformers model needs transformers: pip install transformers") from None
    folder = path if path.is_dir() else path.parent
    file = folder / "config.json" if path.is_dir() else path
    if not file.is_file():
        raise UsageError(f"{path} holds no config.json: name a transformers model's folder or its config")
    if text is None:
        raise UsageError(f"{path} needs a text for its batches: add --text FILE")
    content = _read(text)
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    try:
        config = transformers.AutoConfig.from_pretrained(str(file))
    except Exception as problem:
        raise UsageError(f"{file} is no transformers config: {_short(problem)}") from problem
    kind = auto_class(transformers, config)
    try:
        torch.manual_seed(0)
        if path.is_dir() and any((folder / name).is_file() for name in _WEIGHTS):
            model = kind.from_pretrained(str(folder), local_files_only=True)
        else:
            model = kind.from_config(config)
    except Exception as problem:
        raise UsageError(f"{file}: the model cannot be built: {_short(problem)}") from problem
    ids = _ids(transformers, folder, content, int(config.get_text_config().vocab_size), str(text))
    name = kind.__name__
    return of_parts(model, _batches(config, ids, "MaskedLM" in name, "Seq2Seq" in name), None, None, str(path))


def auto_class(transformers: Any, config: Any) -> Any:
    """The class of `transformers` that builds `config`'s model with the head it is trained with."""
    named = (getattr(config, "architectures", None) or [""])[0]
    if getattr(config, "is_encoder_decoder", False):
        return transformers.AutoModelForSeq2SeqLM
    if "MaskedLM" in named or ("CausalLM" not in named and "LMHead" not in named and _only_masked(transformers, config)):
        return transformers.AutoModelForMaskedLM
    return transformers.AutoModelForCausalLM


def _only_masked(transformers: Any, config: Any) -> bool:
    """True for encoders (BERT and its kin), whose causal variants are asked for by `is_decoder`."""
    masked = type(config) in transformers.MODEL_FOR_MASKED_LM_MAPPING
    return masked and not getattr(config, "is_decoder", False)


def _ids(transformers: Any, folder: Path, content: str, vocabulary: int, name: str) -> Tensor:
    """The text's ids by the folder's tokenizer; else its bytes, or its characters where the vocabulary is smaller."""
    if any((folder / file).is_file() for file in _TOKENIZERS):
        try:
            tokenizer = transformers.AutoTokenizer.from_pretrained(str(folder), local_files_only=True)
            ids = torch.tensor(tokenizer(content, add_special_tokens=False, verbose=False)["input_ids"])
        except Exception as problem:
            raise UsageError(f"{folder}: its tokenizer cannot be used: {_short(problem)}") from problem
    elif vocabulary >= 256:
        ids = torch.tensor(list(content.encode()))
    else:
        characters = sorted(set(content))
        if len(characters) > vocabulary:
            raise UsageError(f"{name} has {len(characters)} characters and the config {vocabulary} ids, and {folder} holds no tokenizer")
        place = {character: at for at, character in enumerate(characters)}
        ids = torch.tensor([place[character] for character in content])
    if len(ids) < 2 * LONGEST:
        raise UsageError(f"{name} has {len(ids)} tokens; a checkup needs {2 * LONGEST}")
    return ids


def _batches(config: Any, ids: Tensor, masked: bool, sequences: bool) -> list[dict[str, Tensor]]:
    draw = torch.Generator().manual_seed(0)
    inner = config.get_text_config()
    limits = [getattr(inner, name, None) for name in ("max_position_embeddings", "n_positions", "max_seq_len")]
    length = min([LONGEST, *(int(limit) - 2 for limit in limits if isinstance(limit, int) and limit > 4)])
    batches = []
    for _ in range(MOST_BATCHES):
        starts = torch.randint(len(ids) - length, (ROWS,), generator=draw)
        rows = torch.stack([ids[start : start + length] for start in starts.tolist()])
        if sequences:
            batches.append({"input_ids": rows[:, : length // 2], "labels": rows[:, length // 2 :].clone()})
        elif masked:
            hidden = torch.rand(rows.shape, generator=draw) < MASKED
            hidden[:, 0] = True
            mask_id = getattr(inner, "mask_token_id", None) or int(inner.vocab_size) - 1
            batches.append({"input_ids": rows.masked_fill(hidden, mask_id), "labels": rows.masked_fill(~hidden, -100)})
        else:
            batches.append({"input_ids": rows, "labels": rows.clone()})
    return batches


def _read(text: Path) -> str:
    try:
        return text.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as problem:
        raise UsageError(f"--text {text} cannot be read: {getattr(problem, 'strerror', None) or problem}") from None


def _short(problem: BaseException) -> str:
    return " ".join(f"{type(problem).__name__}: {problem}".split())[:300]
