"""The shape of a transformer as one value."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, get_args

from sickbay.reference.settings.demand import demand, is_count, is_number

Norm = Literal["layernorm", "rmsnorm"]
NormPlace = Literal["pre", "post"]
Positions = Literal["learned", "rotary"]
Activation = Literal["gelu", "gelu_tanh", "swiglu", "relu", "relu2"]
Init = Literal["gpt2", "xavier"]


@dataclass(frozen=True)
class Config:
    """The shape of a transformer; a value that no model can have raises ValueError naming field, value and range.

    `dim`: width of the residual stream.
    `num_layers`: blocks.
    `num_heads`: attention heads, each dim / num_heads wide.
    `num_kv_heads`: heads of keys and values, each shared by a group of query heads (Ainslie et al. 2023); none = num_heads.
    `ffn_dim`: width inside the feed-forward part; none = 4 x dim.
    `vocab_size`: ids; a training takes its tokenizer's unless more are asked for.
    `context`: most positions of one row.
    `dropout`: share of activations dropped in training.
    `norm`: of mean square, or of mean and variance.
    `norm_place`: before each part, or after its sum.
    `norm_eps`: added to the variance.
    `positions`: how they are told: turning queries and keys (Su et al. 2021), or a learned vector each.
    `rotary_base`: the longest wavelength of rotary positions is 2 pi times this, in positions.
    `rotary_factor`: waves longer than `rotary_context` become this many times as long (Llama 3.1: Grattafiori et al. 2024); none = not.
    `rotary_context`: the context a model was first trained on, before its waves were stretched.
    `activation`: of the feed-forward part; gelu_tanh is GPT-2's approximation (Hendrycks & Gimpel 2016), relu2 is squared (So et al. 2021).
    `bias`: linear layers and norms have one.
    `qk_norm`: queries and keys of each head are normalised (Henry et al. 2020).
    `logit_softcap`: logits are squashed smoothly into +- this (Gemma 2, 2024); none = not.
    `zero_outputs`: what writes to the residual stream starts at zero, so that each block starts as the identity.
    `tied_embeddings`: the head uses the embedding's matrix.
    `init`: how weights are drawn, told in initialise.py.
    `pad_id`: the id that attention and loss ignore; none = no id is padding.
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
    norm_eps: float = 1e-5
    positions: Positions = "rotary"
    rotary_base: float = 10_000.0
    rotary_factor: float | None = None
    rotary_context: int = 8192
    activation: Activation = "gelu"
    bias: bool = False
    qk_norm: bool = False
    logit_softcap: float | None = None
    zero_outputs: bool = False
    tied_embeddings: bool = True
    init: Init = "gpt2"
    pad_id: int | None = None

    def __post_init__(self) -> None:
        for field in ("dim", "num_layers", "num_heads", "vocab_size", "context", "rotary_context"):
            demand(field, getattr(self, field), is_count(getattr(self, field)), "an integer of at least 1")
        demand("ffn_dim", self.ffn_dim, self.ffn_dim is None or is_count(self.ffn_dim), "None (4 x dim) or an integer of at least 1")
        divides = self.dim % self.num_heads == 0
        demand("num_heads", self.num_heads, divides, f"a divisor of dim={self.dim}")
        shared = self.num_kv_heads is None or (is_count(self.num_kv_heads) and self.num_heads % self.num_kv_heads == 0)
        demand("num_kv_heads", self.num_kv_heads, shared, f"None or a divisor of num_heads={self.num_heads}")
        even = self.positions != "rotary" or self.head_dim % 2 == 0
        demand("num_heads", self.num_heads, even, f"such that dim/num_heads is even with rotary positions (it is {self.head_dim})")
        demand("dropout", self.dropout, is_number(self.dropout) and 0 <= self.dropout < 1, "at least 0 and below 1")
        choices = {"norm": Norm, "norm_place": NormPlace, "positions": Positions, "activation": Activation, "init": Init}
        for field, kind in choices.items():
            demand(field, getattr(self, field), getattr(self, field) in get_args(kind), f"one of {', '.join(get_args(kind))}")
        demand("rotary_base", self.rotary_base, is_number(self.rotary_base) and self.rotary_base > 1, "above 1 and finite")
        stretched = self.rotary_factor is None or (is_number(self.rotary_factor) and self.rotary_factor >= 1)
        demand("rotary_factor", self.rotary_factor, stretched, "None or at least 1")
        demand("norm_eps", self.norm_eps, is_number(self.norm_eps) and 0 < self.norm_eps < 1, "above 0 and below 1")
        capped = self.logit_softcap is None or (is_number(self.logit_softcap) and self.logit_softcap > 0)
        demand("logit_softcap", self.logit_softcap, capped, "None or above 0 and finite")
        for field in ("bias", "qk_norm", "zero_outputs", "tied_embeddings"):
            demand(field, getattr(self, field), isinstance(getattr(self, field), bool), "True or False")
        in_range = self.pad_id is None or (isinstance(self.pad_id, int) and 0 <= self.pad_id < self.vocab_size)
        demand("pad_id", self.pad_id, in_range, f"None or an id from 0 to {self.vocab_size - 1}")

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
