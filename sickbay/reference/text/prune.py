"""A smaller vocabulary: a BPE tokenizer with fewer tokens, and the rows of the model that go with them.

A text whose tokens are all kept has the same tokens, renumbered, and the same logits for them; any other text still decodes to itself,
in more tokens (Abdaoui et al. 2020, arXiv 2010.05609, prune rows; a tokenizer needs its merges pruned with them).
"""

from __future__ import annotations

import itertools
import json
import re
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import numpy as np

from sickbay.reference.text.bpe import LibraryTokenizer
from sickbay.reference.text.tokenizer import Ids, Tokenizer
from sickbay.reference.text.vocab import Counts

BYTE_TOKEN = re.compile(r"<0x[0-9A-F]{2}>")  # SentencePiece's byte fallback


@dataclass(frozen=True, eq=False)
class Pruned:
    """`kept`: the old id of each new one, rising, `(vocab_size,)` int64."""

    tokenizer: LibraryTokenizer
    kept: Ids

    def new_id(self, old: int) -> int | None:
        """None for an id that is gone."""
        place = int(np.searchsorted(self.kept, old))
        return place if place < len(self.kept) and self.kept[place] == old else None


def prune(tokenizer: Tokenizer, counts: Counts, keep: int | None = None, also: Iterable[int] = ()) -> Pruned:
    """The tokenizer with `keep` of its tokens: those that must stay, then the most frequent, of equals the lower id.

    `keep` None = all that came at all. Special and added tokens, the byte fallback and `also` always stay, and with each token those that
    BPE merges on the way to it; a token for which these leave no room is passed over. Ids keep their order.
    Raises ValueError where the tokenizer is no BPE that this can prune, or `keep` is out of range.
    """
    held = demand_bpe(tokenizer)
    assert isinstance(tokenizer, LibraryTokenizer)
    merges = Merges(held["model"])
    text_of = {number: text for text, number in tokenizer.library.get_vocab(with_added_tokens=True).items()}
    kept = _must_stay(held) | (set(also) & text_of.keys())
    least, most = len(kept), len(text_of)
    if keep is not None and not least <= keep <= most:
        raise ValueError(f"keep is {keep}; it must be from {least} (special tokens and the byte fallback) to {most} (all there are)")
    for number in counts.order().tolist():
        if keep is None and counts.of[number] == 0:
            break
        if number in text_of and number not in kept:
            with_it = merges.on_the_way(text_of[number]) | {number}
            if keep is None or len(kept | with_it) <= keep:
                kept |= with_it
        if len(kept) == keep:
            break
    order = sorted(kept)
    made = LibraryTokenizer.of_json(json.dumps(_renumbered(held, {old: new for new, old in enumerate(order)})), "the pruned tokenizer")
    moved = [old for new, old in enumerate(order) if made.library.id_to_token(new) != text_of[old]]
    if moved or made.vocab_size != len(order):
        raise ValueError(f"the library numbers this tokenizer's added tokens by itself ({text_of[moved[0]]!r}): it cannot be pruned")
    return Pruned(made, np.array(order, dtype=np.int64))


def demand_bpe(tokenizer: Tokenizer) -> dict[str, Any]:
    """The JSON of a tokenizer that can be pruned. Raises ValueError saying why not."""
    if not isinstance(tokenizer, LibraryTokenizer):
        raise ValueError("a tokenizer of characters or bytes has nothing to fall back on: only BPE can be pruned")
    held: dict[str, Any] = json.loads(tokenizer.library.to_str())
    model = held["model"]
    if model["type"] != "BPE":
        raise ValueError(f"the tokenizer is a {model['type']}; only BPE can be pruned")
    for field in ("continuing_subword_prefix", "end_of_word_suffix", "dropout"):
        if model.get(field):
            raise ValueError(f"the tokenizer's BPE has {field} {model[field]!r}; it can only be pruned without")
    return held


class Merges:
    """The merges of a BPE model, and the tokens that lie on the way to one."""

    def __init__(self, model: dict[str, Any]) -> None:
        self._vocab: dict[str, int] = model["vocab"]
        self._rank = {pair: rank for rank, pair in enumerate(map(_pair, model["merges"]))}

    def on_the_way(self, token: str) -> set[int]:
        """The ids of what the token begins as and is merged from, itself included; empty where merging never ends at it."""
        parts = list(token)
        seen = set(parts)
        while len(parts) > 1:
            pairs = [(self._rank[pair], place) for place, pair in enumerate(itertools.pairwise(parts)) if pair in self._rank]
            if not pairs:
                return set()
            _, place = min(pairs)
            parts[place : place + 2] = ["".join(parts[place : place + 2])]
            seen.add(parts[place])
        return {self._vocab[part] for part in seen} if seen <= self._vocab.keys() else set()


def _must_stay(held: dict[str, Any]) -> set[int]:
    """Added tokens, the unknown token, and whatever every text can be spelled with: bytes, or single characters where there are none."""
    vocab: dict[str, int] = held["model"]["vocab"]
    spelled = {number for text, number in vocab.items() if BYTE_TOKEN.fullmatch(text)}
    if not held["model"]["byte_fallback"] or len(spelled) < 256:
        spelled |= {number for text, number in vocab.items() if len(text) == 1}
    unknown = held["model"]["unk_token"]
    return spelled | {token["id"] for token in held["added_tokens"]} | ({vocab[unknown]} if unknown in vocab else set())


def _renumbered(held: dict[str, Any], new_of: dict[int, int]) -> dict[str, Any]:
    """The tokenizer's JSON with the ids `new_of` alone, and the merges among them."""
    model = held["model"]
    vocab = {text: new_of[number] for text, number in model["vocab"].items() if number in new_of}
    pairs = [pair for pair in map(_pair, model["merges"]) if all(text in vocab for text in (*pair, "".join(pair)))]
    return {
        **held,
        "model": {**model, "vocab": vocab, "merges": [list(pair) for pair in pairs]},
        "added_tokens": [{**token, "id": new_of[token["id"]]} for token in held["added_tokens"]],
        "post_processor": _renumbered_template(held["post_processor"], new_of),
    }


def _renumbered_template(part: Any, new_of: dict[int, int]) -> Any:
    """What is put around a text: its special tokens are given by id too."""
    if part is None:
        return None
    if part["type"] == "Sequence":
        return {**part, "processors": [_renumbered_template(member, new_of) for member in part["processors"]]}
    if part["type"] == "TemplateProcessing":
        special = part["special_tokens"]
        return {
            **part,
            "special_tokens": {name: {**token, "ids": [new_of[number] for number in token["ids"]]} for name, token in special.items()},
        }
    return {name: [value[0], new_of[value[1]]] if name in ("sep", "cls") else value for name, value in part.items()}


def _pair(merge: str | list[str]) -> tuple[str, str]:
    left, right = merge.split(" ") if isinstance(merge, str) else merge
    return left, right
