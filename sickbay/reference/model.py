"""A decoder-only transformer.

Letters after the last underscore of a name are its shape:
    B rows of the batch · T positions · D model width · H heads · K width of one head · F feed-forward width · V vocabulary
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal, get_args

import torch
from torch import Tensor, nn
from torch.nn import functional

Norm = Literal["layernorm", "rmsnorm"]
NormPlace = Literal["pre", "post"]
Positions = Literal["learned", "rotary"]
Activation = Literal["gelu", "swiglu", "relu"]

INIT_STD = 0.02  # Radford et al. 2019 (GPT-2), section 2.3
ROTARY_BASE = 10_000.0  # Su et al. 2021 (RoFormer), section 3.2.2


@dataclass(frozen=True)
class Config:
    """The shape of a transformer; a value that no model can have raises ValueError naming field, value and range.

    `ffn_dim`: None = 4 x dim. `context`: most positions of one row. `pad_id`: None = no id is padding; otherwise
    attention ignores keys with that id and the loss ignores targets with it.
    """

    dim: int = 128
    num_layers: int = 4
    num_heads: int = 4
    ffn_dim: int | None = None
    vocab_size: int = 65
    context: int = 64
    dropout: float = 0.0
    norm: Norm = "rmsnorm"
    norm_place: NormPlace = "pre"
    positions: Positions = "rotary"
    activation: Activation = "gelu"
    tied_embeddings: bool = True
    pad_id: int | None = None

    def __post_init__(self) -> None:
        for field in ("dim", "num_layers", "num_heads", "vocab_size", "context"):
            _demand(field, getattr(self, field), _is_count(getattr(self, field)), "an integer of at least 1")
        _demand("ffn_dim", self.ffn_dim, self.ffn_dim is None or _is_count(self.ffn_dim), "None (4 x dim) or an integer of at least 1")
        divides = self.dim % self.num_heads == 0
        _demand("num_heads", self.num_heads, divides, f"a divisor of dim={self.dim}")
        even = self.positions != "rotary" or self.head_dim % 2 == 0
        _demand("num_heads", self.num_heads, even, f"such that dim/num_heads is even with rotary positions (it is {self.head_dim})")
        _demand("dropout", self.dropout, _is_number(self.dropout) and 0 <= self.dropout < 1, "at least 0 and below 1")
        for field, kind in (("norm", Norm), ("norm_place", NormPlace), ("positions", Positions), ("activation", Activation)):
            _demand(field, getattr(self, field), getattr(self, field) in get_args(kind), f"one of {', '.join(get_args(kind))}")
        _demand("tied_embeddings", self.tied_embeddings, isinstance(self.tied_embeddings, bool), "True or False")
        in_range = self.pad_id is None or (isinstance(self.pad_id, int) and 0 <= self.pad_id < self.vocab_size)
        _demand("pad_id", self.pad_id, in_range, f"None or an id from 0 to {self.vocab_size - 1}")

    @property
    def head_dim(self) -> int:
        return self.dim // self.num_heads

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


Attend = Callable[[Tensor, Tensor, Tensor, "Tensor | None", float], Tensor]


def attend(query_BHTK: Tensor, key_BHTK: Tensor, value_BHTK: Tensor, visible_B1TT: Tensor | None, dropout: float) -> Tensor:
    """Softmax attention `(B, H, T, K)` scaled by 1/sqrt(K) (Vaswani et al. 2017, eq. 1).

    `visible_B1TT`: True where query t may look at key s; None = the causal triangle. `dropout`: share of weights dropped.
    """
    causal = visible_B1TT is None
    return functional.scaled_dot_product_attention(query_BHTK, key_BHTK, value_BHTK, visible_B1TT, dropout, is_causal=causal)


class Attention(nn.Module):
    """Multi-head self-attention, `(B, T, D)` to `(B, T, D)`. `attend` does the mixing and may be replaced."""

    def __init__(self, config: Config) -> None:
        super().__init__()
        self.num_heads, self.dropout = config.num_heads, config.dropout
        self.query_key_value = nn.Linear(config.dim, 3 * config.dim, bias=False)
        self.output = nn.Linear(config.dim, config.dim, bias=False)
        self.attend: Attend = attend

    def forward(self, x_BTD: Tensor, visible_B1TT: Tensor | None, rotation: tuple[Tensor, Tensor] | None) -> Tensor:
        B, T, D = x_BTD.shape
        parts_3BHTK = self.query_key_value(x_BTD).view(B, T, 3, self.num_heads, D // self.num_heads).permute(2, 0, 3, 1, 4)
        query_BHTK, key_BHTK, value_BHTK = parts_3BHTK.unbind(0)
        if rotation is not None:
            query_BHTK, key_BHTK = rotate(query_BHTK, *rotation), rotate(key_BHTK, *rotation)
        mixed_BHTK = self.attend(query_BHTK, key_BHTK, value_BHTK, visible_B1TT, self.dropout if self.training else 0.0)
        out_BTD: Tensor = self.output(mixed_BHTK.transpose(1, 2).reshape(B, T, D))
        return out_BTD


class FeedForward(nn.Module):
    """Two matrices with an activation between, or SwiGLU's three (Shazeer 2020); `(B, T, D)` to `(B, T, D)`."""

    def __init__(self, config: Config) -> None:
        super().__init__()
        gated = config.activation == "swiglu"
        self.up = nn.Linear(config.dim, config.hidden_dim, bias=False)
        self.gate = nn.Linear(config.dim, config.hidden_dim, bias=False) if gated else None
        self.activation: nn.Module = {"gelu": nn.GELU, "swiglu": nn.SiLU, "relu": nn.ReLU}[config.activation]()
        self.down = nn.Linear(config.hidden_dim, config.dim, bias=False)

    def forward(self, x_BTD: Tensor) -> Tensor:
        hidden_BTF = self.activation(self.up(x_BTD)) if self.gate is None else self.activation(self.gate(x_BTD)) * self.up(x_BTD)
        out_BTD: Tensor = self.down(hidden_BTF)
        return out_BTD


class Block(nn.Module):
    """Attention, then feed-forward, each added to the residual stream; `(B, T, D)` to `(B, T, D)`.

    Normalised before each part ("pre": Xiong et al. 2020, trains without warm-up) or after the sum ("post": Vaswani et al. 2017).
    """

    def __init__(self, config: Config) -> None:
        super().__init__()
        self.pre = config.norm_place == "pre"
        self.attention_norm = make_norm(config)
        self.attention = Attention(config)
        self.feed_forward_norm = make_norm(config)
        self.feed_forward = FeedForward(config)
        self.dropout = nn.Dropout(config.dropout)

    def forward(self, x_BTD: Tensor, visible_B1TT: Tensor | None, rotation: tuple[Tensor, Tensor] | None) -> Tensor:
        if self.pre:
            x_BTD = x_BTD + self.dropout(self.attention(self.attention_norm(x_BTD), visible_B1TT, rotation))
            x_BTD = x_BTD + self.dropout(self.feed_forward(self.feed_forward_norm(x_BTD)))
        else:
            x_BTD = self.attention_norm(x_BTD + self.dropout(self.attention(x_BTD, visible_B1TT, rotation)))
            x_BTD = self.feed_forward_norm(x_BTD + self.dropout(self.feed_forward(x_BTD)))
        return x_BTD


class Transformer(nn.Module):
    """`ids (B, T)` to next-token `logits (B, T, V)`, weights drawn as in GPT-2 from torch's current random state."""

    def __init__(self, config: Config) -> None:
        super().__init__()
        self.config = config
        self.token_embedding = nn.Embedding(config.vocab_size, config.dim)
        self.position_embedding = nn.Embedding(config.context, config.dim) if config.positions == "learned" else None
        self.dropout = nn.Dropout(config.dropout)
        self.blocks = nn.ModuleList(Block(config) for _ in range(config.num_layers))
        # A post-norm block ends in its own norm.
        self.final_norm = make_norm(config) if config.norm_place == "pre" else nn.Identity()
        self.head = nn.Linear(config.dim, config.vocab_size, bias=False)
        if config.tied_embeddings:
            self.head.weight = self.token_embedding.weight
        self._initialise()

    def forward(self, ids_BT: Tensor, documents: Tensor | None = None) -> Tensor:
        """Logits `(B, T, V)` for the token after each position of `ids_BT` `(B, T)` int64.

        `documents` `(B, T)`: number of the document each token of a packed row belongs to, each a contiguous stretch;
        tokens then see their own document only and positions restart with it. Raises ValueError beyond `config.context`.
        """
        if ids_BT.dim() != 2 or ids_BT.shape[1] > self.config.context:
            raise ValueError(f"ids have shape {tuple(ids_BT.shape)}; they must be (rows, at most context={self.config.context} positions)")
        visible_B1TT = visibility(ids_BT, documents, self.config.pad_id)
        positions = positions_of(ids_BT, documents, self.config.pad_id)
        x_BTD = self.token_embedding(ids_BT)
        rotation = None
        if self.position_embedding is not None:
            x_BTD = x_BTD + self.position_embedding(positions)
        else:
            rotation = rotation_at(positions, self.config.head_dim)
        x_BTD = self.dropout(x_BTD)
        for block in self.blocks:
            x_BTD = block(x_BTD, visible_B1TT, rotation)
        logits_BTV: Tensor = self.head(self.final_norm(x_BTD))
        return logits_BTV

    def _initialise(self) -> None:
        """Normal(0, 0.02); matrices that write to the residual stream 1/sqrt(2 x layers) of that: its variance stays as layers add up."""
        for name, weight in self.named_parameters():
            if weight.dim() >= 2:
                writes = name.endswith(("attention.output.weight", "feed_forward.down.weight"))
                nn.init.normal_(weight, std=INIT_STD / math.sqrt(2 * self.config.num_layers) if writes else INIT_STD)


def make_norm(config: Config) -> nn.Module:
    return nn.RMSNorm(config.dim, eps=1e-5) if config.norm == "rmsnorm" else nn.LayerNorm(config.dim, bias=False)


def visibility(ids_BT: Tensor, documents_BT: Tensor | None, pad_id: int | None) -> Tensor | None:
    """`(B, 1, T, T)`, True where query t may look at key s: not later, not padding, same document. None = the causal triangle alone."""
    if documents_BT is None and pad_id is None:
        return None
    T = ids_BT.shape[1]
    visible_B1TT = torch.ones(T, T, dtype=torch.bool, device=ids_BT.device).tril().expand(len(ids_BT), 1, T, T)
    if documents_BT is not None:
        visible_B1TT = visible_B1TT & (documents_BT[:, None, :, None] == documents_BT[:, None, None, :])
    if pad_id is not None:
        visible_B1TT = visible_B1TT & (ids_BT != pad_id)[:, None, None, :]
    # Each position sees itself: a softmax over no key at all is 0/0.
    return visible_B1TT | torch.eye(T, dtype=torch.bool, device=ids_BT.device)


def positions_of(ids_BT: Tensor, documents_BT: Tensor | None, pad_id: int | None) -> Tensor:
    """Position of each token in its document, not counting padding: `(T,)` where all rows agree, else `(B, T)`."""
    index_T = torch.arange(ids_BT.shape[1], device=ids_BT.device)
    if documents_BT is None and pad_id is None:
        return index_T
    real_BT = torch.ones_like(ids_BT) if pad_id is None else (ids_BT != pad_id).long()
    before_BT = real_BT.cumsum(1) - real_BT
    if documents_BT is not None:
        starts_BT = torch.ones_like(ids_BT, dtype=torch.bool)
        starts_BT[:, 1:] = documents_BT[:, 1:] != documents_BT[:, :-1]
        first_BT = torch.where(starts_BT, index_T, 0).cummax(1).values
        before_BT = before_BT - before_BT.gather(1, first_BT)
    return before_BT


def rotation_at(positions: Tensor, head_dim: int) -> tuple[Tensor, Tensor]:
    """Cosine and sine of the rotary angles at `positions`, `(T, K/2)` or `(B, 1, T, K/2)`, in float32."""
    frequency = ROTARY_BASE ** (-torch.arange(0, head_dim, 2, device=positions.device, dtype=torch.float32) / head_dim)
    angle = positions[..., None].float() * frequency
    if angle.dim() == 3:
        angle = angle[:, None]
    return angle.cos(), angle.sin()


def rotate(x_BHTK: Tensor, cosine: Tensor, sine: Tensor) -> Tensor:
    """Pairs (k, k + K/2) of `x_BHTK` turned by their position's angles (RoPE), in the dtype of `x_BHTK`."""
    first, second = x_BHTK.chunk(2, dim=-1)
    return torch.cat((first * cosine - second * sine, first * sine + second * cosine), dim=-1).type_as(x_BHTK)
