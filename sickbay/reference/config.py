"""The shape of a transformer as one value."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal, get_args

Norm = Literal["layernorm", "rmsnorm"]
NormPlace = Literal["pre", "post"]
Positions = Literal["learned", "rotary"]
Activation = Literal["gelu", "swiglu", "relu", "relu2"]


@dataclass(frozen=True)
class Config:
    """The shape of a transformer; a value that no model can have raises ValueError naming field, value and range.

    `num_kv_heads`: heads of keys and values, each shared by a group of query heads (Ainslie et al. 2023), None = num_heads.
    `ffn_dim`: None = 4 x dim. `context`: most positions of one row. `activation` "relu2" is ReLU squared (So et al. 2021).
    `bias`: of linear layers and norms. `qk_norm`: queries and keys of each head are normalised (Henry et al. 2020).
    `logit_softcap`: logits are squashed smoothly into +- this (Gemma 2, 2024), None = not. `zero_outputs`: what writes to the
    residual stream starts at zero, so that each block starts as the identity. `pad_id`: None = no id is padding; otherwise
    attention ignores keys with that id and the loss ignores targets with it.
    """

    dim: int = 128
    num_layers: int = 4
    num_heads: int = 4
    num_kv_heads: int | None = None
    ffn_dim: int | None = None
    vocab_size: int = 65
    context: int = 64
    dropout: float = 0.0
    norm: Norm = "rmsnorm"
    norm_place: NormPlace = "pre"
    positions: Positions = "rotary"
    activation: Activation = "gelu"
    bias: bool = False
    qk_norm: bool = False
    logit_softcap: float | None = None
    zero_outputs: bool = False
    tied_embeddings: bool = True
    pad_id: int | None = None

    def __post_init__(self) -> None:
        for field in ("dim", "num_layers", "num_heads", "vocab_size", "context"):
            _demand(field, getattr(self, field), _is_count(getattr(self, field)), "an integer of at least 1")
        _demand("ffn_dim", self.ffn_dim, self.ffn_dim is None or _is_count(self.ffn_dim), "None (4 x dim) or an integer of at least 1")
        divides = self.dim % self.num_heads == 0
        _demand("num_heads", self.num_heads, divides, f"a divisor of dim={self.dim}")
        shared = self.num_kv_heads is None or (_is_count(self.num_kv_heads) and self.num_heads % self.num_kv_heads == 0)
        _demand("num_kv_heads", self.num_kv_heads, shared, f"None or a divisor of num_heads={self.num_heads}")
        even = self.positions != "rotary" or self.head_dim % 2 == 0
        _demand("num_heads", self.num_heads, even, f"such that dim/num_heads is even with rotary positions (it is {self.head_dim})")
        _demand("dropout", self.dropout, _is_number(self.dropout) and 0 <= self.dropout < 1, "at least 0 and below 1")
        for field, kind in (("norm", Norm), ("norm_place", NormPlace), ("positions", Positions), ("activation", Activation)):
            _demand(field, getattr(self, field), getattr(self, field) in get_args(kind), f"one of {', '.join(get_args(kind))}")
        capped = self.logit_softcap is None or (_is_number(self.logit_softcap) and 0 < self.logit_softcap < math.inf)
        _demand("logit_softcap", self.logit_softcap, capped, "None or above 0 and finite")
        for field in ("bias", "qk_norm", "zero_outputs", "tied_embeddings"):
            _demand(field, getattr(self, field), isinstance(getattr(self, field), bool), "True or False")
        in_range = self.pad_id is None or (isinstance(self.pad_id, int) and 0 <= self.pad_id < self.vocab_size)
        _demand("pad_id", self.pad_id, in_range, f"None or an id from 0 to {self.vocab_size - 1}")

    @property
    def head_dim(self) -> int:
        return self.dim // self.num_heads

    @property
    def kv_heads(self) -> int:
        """Heads of keys and values."""
        return self.num_heads if self.num_kv_heads is None else self.num_kv_heads

    @property
    def hidden_dim(self) -> int:
        """Width inside the feed-forward block."""
        return 4 * self.dim if self.ffn_dim is None else self.ffn_dim


def _demand(field: str, value: object, holds: bool, allowed: str) -> None:
    if not holds:
        raise ValueError(f"{field} is {value!r}; it must be {allowed}")


def _is_count(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 1


def _is_number(value: object) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)
