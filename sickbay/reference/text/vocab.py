"""What a vocabulary does with a text, and what its rows cost a model."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from safetensors import safe_open

from sickbay.reference.data.sources import Text
from sickbay.reference.text.tokenizer import CharTokenizer, Ids, Tokenizer

COVERAGE = (0.5, 0.9, 0.99, 0.999, 1.0)  # of a text's tokens
STATE_COPIES = 4  # of a trained row: weight, gradient, and the two moments that Adam keeps (Kingma & Ba 2015, algorithm 1)
# What known models call the tensors that have a row for each id.
EMBEDDINGS = ("token_embedding.weight", "wte.weight", "embed_tokens.weight", "embed_in.weight", "word_embeddings.weight")
HEADS = ("head.weight", "lm_head.weight", "lm_head.bias", "embed_out.weight")


@dataclass(frozen=True)
class Counts:
    """`of`: how often each id came, `(vocab_size,)` int64. `text_bytes`: of the text as UTF-8."""

    of: Ids
    text_bytes: int

    @property
    def tokens(self) -> int:
        return int(self.of.sum())

    @property
    def bytes_per_token(self) -> float:
        """NaN without a token."""
        return self.text_bytes / self.tokens if self.tokens else math.nan

    def order(self) -> Ids:
        """All ids, the most frequent first; of equally frequent ones the lower id."""
        return np.argsort(-self.of, kind="stable")


@dataclass(frozen=True)
class Use:
    """How a text uses a vocabulary. `special`, `unused`, `once`: ids. `coverage`: share of the tokens -> fewest ids that make it up.

    `most_frequent`: (id, its text, share of the tokens), ten of them.
    """

    vocab_size: int
    special: int
    end_of_text: int | None
    text_bytes: int
    tokens: int
    bytes_per_token: float
    used: int
    once: int
    unused: tuple[int, ...]
    coverage: dict[float, int]
    most_frequent: tuple[tuple[int, str, float], ...]


@dataclass(frozen=True)
class Cost:
    """What the rows of a vocabulary cost. `weight_bytes`: as saved; `training_bytes`: with gradient and Adam's two moments.

    `matrices`: 2 where the head has its own. `share`: of the model's `parameters`.
    """

    rows: int
    dim: int
    matrices: int
    weight_bytes: int
    training_bytes: int
    parameters: int
    share: float


def count_ids(text: Text, tokenizer: Tokenizer) -> Counts:
    """The ids of all documents of `text`, counted. Raises UsageError for a text that cannot be read, ValueError for one without ids."""
    counts = np.zeros(tokenizer.vocab_size, dtype=np.int64)
    size = 0
    for document in text.documents():
        for piece in tokenizer.pieces(document.chunks):
            counts += np.bincount(tokenizer.encode(piece), minlength=len(counts))
            size += len(piece.encode("utf-8"))
    return Counts(counts, size)


def use(counts: Counts, tokenizer: Tokenizer) -> Use:
    """How the counted text uses the vocabulary. Raises ValueError for a text without a token."""
    if not counts.tokens:
        raise ValueError("the text is empty")
    order = counts.order()
    reached = counts.of[order].cumsum()
    coverage = {share: int(np.searchsorted(reached, math.ceil(share * counts.tokens))) + 1 for share in COVERAGE}
    most = [(number, tokenizer.decode([number]), int(counts.of[number]) / counts.tokens) for number in order[:10].tolist()]
    return Use(
        vocab_size=tokenizer.vocab_size,
        special=len(special_ids(tokenizer)),
        end_of_text=tokenizer.end_of_text,
        text_bytes=counts.text_bytes,
        tokens=counts.tokens,
        bytes_per_token=counts.bytes_per_token,
        used=int((counts.of > 0).sum()),
        once=int((counts.of == 1).sum()),
        unused=tuple(np.flatnonzero(counts.of == 0).tolist()),
        coverage=coverage,
        most_frequent=tuple(entry for entry in most if entry[2] > 0),
    )


def special_ids(tokenizer: Tokenizer) -> set[int]:
    """The ids that stand for no text."""
    if isinstance(tokenizer, CharTokenizer):
        return set()
    special: Mapping[int, str] = getattr(tokenizer, "special", {})
    return set(special) | ({tokenizer.end_of_text} if tokenizer.end_of_text is not None else set())


def row_tensors(shapes: Mapping[str, tuple[int, ...]]) -> list[str]:
    """The names of those tensors that have a row for each id, the embedding first; empty where none is known by its name."""
    return [name for endings in (EMBEDDINGS, HEADS) for name in sorted(shapes) if _ends(name, endings)]


def cost(folder: Path) -> Cost | None:
    """What the vocabulary costs the model whose safetensors files `folder` holds, read from their headers; None where there is no model.

    Raises ValueError where no tensor is known to have a row for each id.
    """
    shapes, sizes = headers(folder)
    if not shapes:
        return None
    rows = row_tensors(shapes)
    if not rows:
        raise ValueError(f"{folder}: no tensor is named as an embedding of tokens is ({', '.join(EMBEDDINGS)})")
    weight_bytes = sum(sizes[name] for name in rows)
    parameters = sum(math.prod(shape) for shape in shapes.values())
    count, dim = shapes[rows[0]]
    matrices = [name for name in rows if len(shapes[name]) == 2]
    share = sum(math.prod(shapes[name]) for name in rows) / parameters
    return Cost(count, dim, len(matrices), weight_bytes, STATE_COPIES * weight_bytes, parameters, share)


def headers(folder: Path) -> tuple[dict[str, tuple[int, ...]], dict[str, int]]:
    """Shape and bytes of each tensor in the model's safetensors files in `folder`. Raises ValueError for a damaged file."""
    shapes: dict[str, tuple[int, ...]] = {}
    sizes: dict[str, int] = {}
    index = folder / "model.index.json"
    for file in sorted(folder.glob("model*.safetensors")):
        try:
            with safe_open(file, framework="pt") as opened:
                for name in opened.keys():  # noqa: SIM118 - the opened file is no dict
                    part = opened.get_slice(name)
                    shapes[name] = tuple(part.get_shape())
                    sizes[name] = math.prod(shapes[name]) * BYTES_OF[part.get_dtype()]
        except Exception as problem:  # safetensors raises half a dozen kinds for a damaged file
            raise ValueError(f"{file} cannot be read: {problem}") from problem
    if index.is_file():  # the parts of a tensor, which the index joins
        told: dict[str, Any] = json.loads(index.read_text(encoding="utf-8"))
        joined = {name: tuple(entry["shape"]) for name, entry in told.items()}
        sizes = {name: sum(sizes[part["key"]] for part in entry["parts"]) for name, entry in told.items()}
        shapes = joined
    return shapes, sizes


BYTES_OF = {"F64": 8, "I64": 8, "F32": 4, "I32": 4, "F16": 2, "BF16": 2, "I16": 2, "F8_E4M3": 1, "F8_E5M2": 1, "I8": 1, "U8": 1, "BOOL": 1}


def _ends(name: str, endings: tuple[str, ...]) -> bool:
    return any(name == ending or name.endswith(f".{ending}") for ending in endings)
