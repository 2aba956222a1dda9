"""Small targets for the checkup: healthy ones, and the same with one fault each."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

VOCABULARY, LENGTH, ROWS, WIDTH = 17, 10, 6, 16


class Tiny(nn.Module):
    """One block of causal attention; `(B, T)` ids to `(B, T, V)` logits."""

    def __init__(self, width: int = WIDTH, num_heads: int = 2, causal: bool = True, dropout: float = 0.0) -> None:
        super().__init__()
        self.width, self.num_heads, self.causal, self.dropout = width, num_heads, causal, dropout
        self.tokens, self.positions = nn.Embedding(VOCABULARY, width), nn.Embedding(LENGTH, width)
        self.norm, self.qkv, self.out = nn.LayerNorm(width), nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.mlp = nn.Sequential(nn.LayerNorm(width), nn.Linear(width, 64), nn.GELU(), nn.Linear(64, width))
        self.head = nn.Linear(width, VOCABULARY)

    def forward(self, ids: Tensor) -> Tensor:
        x = self.tokens(ids) + self.positions(torch.arange(ids.shape[1]))
        parts = self.qkv(self.norm(x)).unflatten(-1, (3, self.num_heads, -1)).permute(2, 0, 3, 1, 4)
        mixed = functional.scaled_dot_product_attention(*parts, is_causal=self.causal).transpose(1, 2).flatten(2)
        x = x + functional.dropout(self.out(mixed), self.dropout, self.training)
        return self.head(x + self.mlp(x))


class Deaf(Tiny):
    """Declares a setting that nothing reads."""

    def __init__(self, width: int = WIDTH, num_heads: int = 2, use_rope: bool = False) -> None:
        super().__init__(width, num_heads)
        self.use_rope = use_rope


class WrongSilu(torch.autograd.Function):
    """x * sigmoid(x), with a backward that forgets the product rule's second term."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        return x * torch.sigmoid(x)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        (x,) = ctx.saved_tensors
        return grad * torch.sigmoid(x)


class RoundThrough(torch.autograd.Function):
    """Rounds, and passes the gradient straight through: on purpose."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x.round()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        return grad


class Applied(nn.Module):
    """A custom Function as a module."""

    def __init__(self, function: Any) -> None:
        super().__init__()
        self.function = function

    def forward(self, x: Tensor) -> Tensor:
        return self.function.apply(x)


def batches() -> Iterator[tuple[Tensor, Tensor]]:
    """Rows that count upwards from a random number, by a random stride."""
    draw = torch.Generator().manual_seed(0)
    while True:
        start, stride = torch.randint(VOCABULARY, (ROWS, 1), generator=draw), torch.randint(1, 4, (ROWS, 1), generator=draw)
        rows = (start + stride * torch.arange(LENGTH + 1)) % VOCABULARY
        yield rows[:, :-1], rows[:, 1:]


def next_token(outputs: Tensor, targets: Tensor) -> Tensor:
    return functional.cross_entropy(outputs.flatten(0, 1), targets.flatten())


def tiny(**settings: Any) -> Tiny:
    torch.manual_seed(0)
    return Tiny(**settings)


def healthy() -> tuple[nn.Module, Iterator[tuple[Tensor, Tensor]], Any]:
    return tiny(), batches(), next_token


def leaky() -> tuple[nn.Module, Iterator[tuple[Tensor, Tensor]], Any]:
    return tiny(causal=False), batches(), next_token
