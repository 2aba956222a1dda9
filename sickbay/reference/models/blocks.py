"""The parts that every transformer here is built of: attention, feed-forward, block, and rotary positions.

Letters after the last underscore of a name are its shape:
    B rows of the batch · T positions · S positions looked at · D model width · H heads · G heads of keys and values · K width of one head
    F feed-forward width · V vocabulary
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn import functional

from sickbay.reference.models.cache import LayerCache
from sickbay.reference.models.config import Config

SLOW_TURNS, FAST_TURNS = 1.0, 4.0  # low_freq_factor and high_freq_factor of every Llama 3.1 to 3.3

Rotation = tuple[Tensor, Tensor]
Attend = Callable[[Tensor, Tensor, Tensor, "Tensor | None", float], Tensor]


def attend(query_BHTK: Tensor, key_BGSK: Tensor, value_BGSK: Tensor, visible_B1TS: Tensor | None, dropout: float) -> Tensor:
    """Softmax attention `(B, H, T, K)` scaled by 1/sqrt(K) (Vaswani et al. 2017, eq. 1).

    `visible_B1TS`: True where query t may look at key s; None = the causal triangle, and a single query comes last and sees all.
    `dropout`: share of weights dropped.
    """
    causal = visible_B1TS is None and query_BHTK.shape[2] > 1
    grouped = key_BGSK.shape[1] != query_BHTK.shape[1]
    return functional.scaled_dot_product_attention(
        query_BHTK, key_BGSK, value_BGSK, visible_B1TS, dropout, is_causal=causal, enable_gqa=grouped
    )


def attend_all(query_BHTK: Tensor, key_BGSK: Tensor, value_BGSK: Tensor, visible_B1TS: Tensor | None, dropout: float) -> Tensor:
    """As `attend`, but None = every query sees every key."""
    grouped = key_BGSK.shape[1] != query_BHTK.shape[1]
    return functional.scaled_dot_product_attention(query_BHTK, key_BGSK, value_BGSK, visible_B1TS, dropout, enable_gqa=grouped)


class Attention(nn.Module):
    """Multi-head self-attention, `(B, T, D)` to `(B, T, D)`. `attend` does the mixing and may be replaced.

    `causal`: where nothing else is said, a position sees itself and those before; otherwise all.
    """

    def __init__(self, config: Config, causal: bool = True) -> None:
        super().__init__()
        self.num_heads, self.kv_heads, self.head_dim = config.num_heads, config.kv_heads, config.head_dim
        self.dropout = config.dropout
        self.query_key_value = nn.Linear(config.dim, (config.num_heads + 2 * config.kv_heads) * config.head_dim, bias=config.bias)
        self.query_norm = nn.RMSNorm(config.head_dim, eps=config.norm_eps) if config.qk_norm else None
        self.key_norm = nn.RMSNorm(config.head_dim, eps=config.norm_eps) if config.qk_norm else None
        self.output = nn.Linear(config.dim, config.dim, bias=config.bias)
        self.attend: Attend = attend if causal else attend_all

    @property
    def stack(self) -> tuple[int, ...]:
        """Rows of `query_key_value` that are queries, keys and values; with "tp" those of one process, one process after another."""
        return tuple(heads * self.head_dim for heads in (self.num_heads, self.kv_heads, self.kv_heads))

    def forward(self, x_BTD: Tensor, visible_B1TS: Tensor | None, rotation: Rotation | None, cache: LayerCache | None = None) -> Tensor:
        """`cache`: keys and values of the positions before, to which these are added."""
        B, T, _ = x_BTD.shape
        H, G = self.num_heads, self.kv_heads
        heads_BXTK = self.query_key_value(x_BTD).view(B, T, H + 2 * G, self.head_dim).transpose(1, 2)
        query_BHTK, key_BGTK, value_BGTK = heads_BXTK.split_with_sizes((H, G, G), dim=1)
        if self.query_norm is not None and self.key_norm is not None:
            weights = self.query_norm.weight.dtype  # under autocast queries and keys are in half precision, a norm's weights are not
            query_BHTK, key_BGTK = self.query_norm(query_BHTK.to(weights)), self.key_norm(key_BGTK.to(weights))
        if rotation is not None:
            query_BHTK, key_BGTK = rotate(query_BHTK, *rotation), rotate(key_BGTK, *rotation)
        if cache is not None:
            key_BGTK, value_BGTK = cache.extend(key_BGTK, value_BGTK)
        mixed_BHTK = self.attend(query_BHTK, key_BGTK, value_BGTK, visible_B1TS, self.dropout if self.training else 0.0)
        out_BTD: Tensor = self.output(mixed_BHTK.transpose(1, 2).flatten(2))
        return out_BTD


class SquaredReLU(nn.Module):
    """max(x, 0) squared (So et al. 2021, Primer)."""

    def forward(self, x: Tensor) -> Tensor:
        return functional.relu(x).square()


ACTIVATIONS: dict[str, Callable[[], nn.Module]] = {
    "gelu": nn.GELU,
    "gelu_tanh": lambda: nn.GELU(approximate="tanh"),
    "swiglu": nn.SiLU,
    "relu": nn.ReLU,
    "relu2": SquaredReLU,
}


class FeedForward(nn.Module):
    """Two matrices with an activation between, or SwiGLU's three (Shazeer 2020); `(B, T, D)` to `(B, T, D)`."""

    def __init__(self, config: Config) -> None:
        super().__init__()
        gated = config.activation == "swiglu"
        self.up = nn.Linear(config.dim, config.hidden_dim, bias=config.bias)
        self.gate = nn.Linear(config.dim, config.hidden_dim, bias=config.bias) if gated else None
        self.activation: nn.Module = ACTIVATIONS[config.activation]()
        self.down = nn.Linear(config.hidden_dim, config.dim, bias=config.bias)

    def forward(self, x_BTD: Tensor) -> Tensor:
        hidden_BTF = self.activation(self.up(x_BTD)) if self.gate is None else self.activation(self.gate(x_BTD)) * self.up(x_BTD)
        out_BTD: Tensor = self.down(hidden_BTF)
        return out_BTD


class Block(nn.Module):
    """Attention, then feed-forward, each added to the residual stream; `(B, T, D)` to `(B, T, D)`.

    Normalised before each part ("pre": Xiong et al. 2020, trains without warm-up) or after the sum ("post": Vaswani et al. 2017).
    """

    def __init__(self, config: Config, causal: bool = True) -> None:
        super().__init__()
        self.pre = config.norm_place == "pre"
        self.attention_norm = make_norm(config)
        self.attention = Attention(config, causal)
        self.feed_forward_norm = make_norm(config)
        self.feed_forward = FeedForward(config)
        self.dropout = nn.Dropout(config.dropout)

    def forward(self, x_BTD: Tensor, visible_B1TS: Tensor | None, rotation: Rotation | None, cache: LayerCache | None = None) -> Tensor:
        if self.pre:
            x_BTD = x_BTD + self.dropout(self.attention(self.attention_norm(x_BTD), visible_B1TS, rotation, cache))
            x_BTD = x_BTD + self.dropout(self.feed_forward(self.feed_forward_norm(x_BTD)))
        else:
            x_BTD = self.attention_norm(x_BTD + self.dropout(self.attention(x_BTD, visible_B1TS, rotation, cache)))
            x_BTD = self.feed_forward_norm(x_BTD + self.dropout(self.feed_forward(x_BTD)))
        return x_BTD


def make_norm(config: Config) -> nn.Module:
    """A norm over the model's width."""
    if config.norm == "rmsnorm":
        return nn.RMSNorm(config.dim, eps=config.norm_eps)
    return nn.LayerNorm(config.dim, eps=config.norm_eps, bias=config.bias)


def rotation_at(positions: Tensor, config: Config) -> Rotation:
    """Cosine and signed sine, for `rotate`, of the rotary angles at `positions` (Su et al. 2021, section 3.2.2).

    `(T, K)` or `(B, 1, T, K)` in float32, the second half as the first but for the sine's sign.
    """
    pairs = torch.arange(0, config.head_dim, 2, device=positions.device, dtype=torch.float32)
    frequency = config.rotary_base ** (-pairs / config.head_dim)
    if config.rotary_factor is not None:
        frequency = stretched(frequency, config.rotary_factor, config.rotary_context)
    angle = positions[..., None].float() * frequency
    if angle.dim() == 3:
        angle = angle[:, None]
    cosine, sine = angle.cos(), angle.sin()
    return torch.cat((cosine, cosine), dim=-1), torch.cat((-sine, sine), dim=-1)


def stretched(frequency: Tensor, factor: float, context: int) -> Tensor:
    """Waves that turn less than once in `context` `factor` times as long, those that turn four times as they were, in between a mean.

    Angles in a longer context are then such as the model has seen. Llama 3.1's code, which uses the same once and four times.
    """
    turns = context * frequency / (2 * math.pi)
    kept = ((turns - SLOW_TURNS) / (FAST_TURNS - SLOW_TURNS)).clamp(0, 1)
    return frequency * (kept + (1 - kept) / factor)


def rotate(x_BHTK: Tensor, cosine: Tensor, sine: Tensor) -> Tensor:
    """Pairs (k, k + K/2) of `x_BHTK` turned by their position's angles (RoPE), in the dtype of `x_BHTK`."""
    return (x_BHTK * cosine + x_BHTK.roll(x_BHTK.shape[-1] // 2, dims=-1) * sine).type_as(x_BHTK)
