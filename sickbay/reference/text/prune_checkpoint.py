"""A checkpoint with a smaller vocabulary: of `sickbay train`, or a folder of transformers with safetensors and a tokenizer.json.

Tokenizer, rows of embedding and head, what the optimizer keeps of them, and every id in the settings change together.
"""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from sickbay.reference.data.sources import Text
from sickbay.reference.data.tasks import objective_of
from sickbay.reference.saving import checkpoint, durable, shards
from sickbay.reference.settings.recipe import Recipe
from sickbay.reference.text.prune import Pruned, prune
from sickbay.reference.text.tokenizer import Tokenizer, load
from sickbay.reference.text.vocab import EMBEDDINGS, Counts, count_ids, headers, row_tensors

KEPT = "kept_ids.json"  # in the new folder: the old id of each new one
KINDS = ("model", "average", "optimizer")
TOKEN_ID = re.compile(r"_token_ids?$")
# Settings of transformers that hold ids in forms of their own.
OTHER_IDS = ("bad_words_ids", "force_words_ids", "suppress_tokens", "begin_suppress_tokens", "forced_decoder_ids", "sequence_bias")
COPIED = ("special_tokens_map.json", "chat_template.jinja", "LICENSE*")

Choose = Callable[[Tokenizer, set[int]], Pruned]


@dataclass(frozen=True)
class Result:
    """`folder`: the new checkpoint. Tokens: of the text it was pruned by. Parameters: of the model."""

    folder: str
    old_vocab_size: int
    vocab_size: int
    old_tokens: int
    tokens: int
    old_parameters: int
    parameters: int


def prune_checkpoint(folder: Path, text: Text, out: Path, keep: int | None = None) -> Result:
    """`out` holds the checkpoint in or at `folder` with the tokens that `prune` keeps, counted on `text`; of a run, `out` is a run again.

    Raises ValueError for what cannot be pruned, and nothing is written then; FileNotFoundError, UsageError, OSError.
    """
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise ValueError(f"{out} is there already; give the folder of a new checkpoint")
    counted: list[Counts] = []
    made: list[Pruned] = []

    def choose(tokenizer: Tokenizer, also: set[int]) -> Pruned:
        counted.append(count_ids(text, tokenizer))
        if not counted[0].tokens:
            raise ValueError("the text is empty: nothing says which tokens to keep")
        made.append(prune(tokenizer, counted[0], keep, also))
        return made[0]

    if (folder / "config.json").is_file():
        old, new = folder, _prune_transformers(folder, out, choose)
        old_rows = int(json.loads((folder / "config.json").read_text(encoding="utf-8"))["vocab_size"])
    else:
        state = checkpoint.read(folder)
        old, new, old_rows = state.folder, _prune_own(state, out, choose), state.config.vocab_size
    pruned = made[0]
    rows = len(json.loads((new / KEPT).read_text(encoding="utf-8")))
    sizes = [sum(torch.Size(shape).numel() for shape in headers(place)[0].values()) for place in (old, new)]
    return Result(str(new), old_rows, rows, counted[0].tokens, count_ids(text, pruned.tokenizer).tokens, sizes[0], sizes[1])


def _prune_own(state: checkpoint.State, out: Path, choose: Choose) -> Path:
    pad = state.config.pad_id
    pruned = choose(state.tokenizer, set() if pad is None else {pad})
    ids, more = state.tokenizer.vocab_size, objective_of(Recipe(**state.recipe), state.config, state.tokenizer).extra_ids
    # Masks and sentinels stand after the tokenizer's ids, and do so again.
    pruned = replace(pruned, kept=np.append(pruned.kept, np.arange(ids, ids + more)))
    held = durable.read(state.folder)
    target = out / state.folder.name
    with _made_whole(target) as partial:
        for kind in KINDS:
            if (state.folder / f"{kind}.safetensors").is_file() or (state.folder / f"{kind}.index.json").is_file():
                with shards.Stored(state.folder, kind) as stored:
                    names = row_tensors({_of_weight(name, kind): stored.shape(name) for name in stored.names()})
                    # What an optimizer keeps of a matrix of rows has rows too, or is one number for all of it.
                    tensors = {
                        name: _rows(stored.whole(name), pruned, state.config.vocab_size)
                        if _of_weight(name, kind) in names and stored.shape(name)
                        else stored.whole(name)
                        for name in stored.names()
                    }
                save_file(tensors, partial / f"{kind}.safetensors")
        for file in state.folder.glob("random*.safetensors"):
            shutil.copy(file, partial)
        pad_id = None if pad is None else pruned.new_id(pad)
        _write_tokenizer(pruned, partial)
        durable.publish(partial, target, {**held, "config": {**held["config"], "vocab_size": len(pruned.kept), "pad_id": pad_id}})
    return target


def _prune_transformers(folder: Path, out: Path, choose: Choose) -> Path:
    if not (folder / "tokenizer.json").is_file():
        raise ValueError(f"{folder} holds no tokenizer.json; save its tokenizer with transformers' fast tokenizer first")
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    rows = config.get("vocab_size")
    if not isinstance(rows, int) or "quantization_config" in config:
        raise ValueError(f"{folder / 'config.json'} has no vocab_size of its own, or the model is quantised: it cannot be pruned")
    files = sorted(folder.glob("*.safetensors"))
    names = _row_names(folder, files, rows)
    settings = {name: _settings(folder / name) for name in ("config.json", "generation_config.json") if (folder / name).is_file()}
    tokenizer = load(folder / "tokenizer.json")
    if tokenizer.vocab_size > rows:
        raise ValueError(f"{folder}: the tokenizer has {tokenizer.vocab_size} ids and the model {rows} rows; they do not belong together")
    pruned = choose(tokenizer, {number for held in settings.values() for number in _ids_in(held)})
    with _made_whole(out) as partial:
        total = 0
        for file in files:
            with safe_open(file, framework="pt") as opened:
                tensors = {name: opened.get_tensor(name) for name in opened.keys()}  # noqa: SIM118 - the opened file is no dict
                metadata = opened.metadata()
            tensors = {name: _rows(value, pruned, rows) if name in names else value for name, value in tensors.items()}
            save_file(tensors, partial / file.name, metadata=metadata)
            total += sum(value.nbytes for value in tensors.values())
        for name, held in settings.items():
            changed = {key: _new_ids(value, pruned) if TOKEN_ID.search(key) else value for key, value in held.items()}
            _write_json(partial / name, {**changed, "vocab_size": len(pruned.kept)} if name == "config.json" else changed)
        for index in folder.glob("*.safetensors.index.json"):
            _write_json(partial / index.name, {**_settings(index), "metadata": {"total_size": total}})
        if (folder / "tokenizer_config.json").is_file():
            _write_json(partial / "tokenizer_config.json", _tokenizer_config(_settings(folder / "tokenizer_config.json"), pruned))
        for pattern in COPIED:
            for file in folder.glob(pattern):
                shutil.copy(file, partial)
        _write_tokenizer(pruned, partial)
        for file in partial.iterdir():
            durable.flush(file)
        if out.is_dir():
            out.rmdir()
        partial.rename(out)
    return out


@contextmanager
def _made_whole(target: Path) -> Iterator[Path]:
    """A folder to fill that takes `target`'s name at the end, and is gone where that fails."""
    target.parent.mkdir(parents=True, exist_ok=True)
    partial = durable.partial_of(target)
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir()
    try:
        yield partial
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        raise


def _row_names(folder: Path, files: list[Path], rows: int) -> list[str]:
    """The tensors with a row for each id. Raises ValueError where one may have such rows and is not known."""
    if not files:
        raise ValueError(f"{folder} holds no safetensors file; save the model with safe_serialization=True first")
    shapes: dict[str, tuple[int, ...]] = {}
    for file in files:
        with safe_open(file, framework="pt") as opened:
            shapes |= {name: tuple(opened.get_slice(name).get_shape()) for name in opened.keys()}  # noqa: SIM118
    names = row_tensors(shapes)
    if not names:
        raise ValueError(
            f"{folder}: no tensor is named as an embedding of tokens is ({', '.join(EMBEDDINGS)}): this model cannot be pruned"
        )
    wrong = [name for name in names if shapes[name][0] != rows]
    unknown = [name for name, shape in shapes.items() if rows in shape and name not in names]
    if wrong:
        raise ValueError(f"{folder}: {wrong[0]} has shape {shapes[wrong[0]]}; its first number should be vocab_size, {rows}")
    if unknown:
        told = f"{unknown[0]} of shape {shapes[unknown[0]]} may or may not have a row for each of the {rows} ids"
        raise ValueError(f"{folder}: {told}: this model cannot be pruned")
    return names


def _rows(tensor: Tensor, pruned: Pruned, rows: int) -> Tensor:
    """The kept rows of `tensor` `(rows, ...)`."""
    assert tensor.shape[0] == rows, (tuple(tensor.shape), rows)
    return tensor[torch.from_numpy(pruned.kept)].contiguous()


def _of_weight(name: str, kind: str) -> str:
    """The name of the weight that a saved tensor is, or is kept for by the optimizer."""
    return name.rpartition(".")[0] if kind == "optimizer" else name


def _settings(file: Path) -> dict[str, Any]:
    held: dict[str, Any] = json.loads(file.read_text(encoding="utf-8"))
    other = [key for key in OTHER_IDS if held.get(key)]
    if other:
        raise ValueError(f"{file} sets {other[0]}, whose ids cannot be renumbered; take it out first")
    return held


def _ids_in(held: dict[str, Any]) -> Iterator[int]:
    for key, value in held.items():
        if TOKEN_ID.search(key):
            yield from (number for number in (value if isinstance(value, list) else [value]) if isinstance(number, int))


def _new_ids(value: Any, pruned: Pruned) -> Any:
    """An id or a list of ids renumbered; one that no token has becomes none."""
    if isinstance(value, list):
        return [new for number in value if (new := pruned.new_id(number)) is not None]
    return pruned.new_id(value) if isinstance(value, int) else value


def _tokenizer_config(held: dict[str, Any], pruned: Pruned) -> dict[str, Any]:
    decoder = held.get("added_tokens_decoder")
    if decoder is None:
        return held
    return {**held, "added_tokens_decoder": {str(pruned.new_id(int(number))): token for number, token in decoder.items()}}


def _write_tokenizer(pruned: Pruned, folder: Path) -> None:
    pruned.tokenizer.save(folder / "tokenizer.json")
    _write_json(folder / KEPT, pruned.kept.tolist())


def _write_json(file: Path, held: Any) -> None:
    file.write_text(json.dumps(held, indent=2) + "\n", encoding="utf-8")
