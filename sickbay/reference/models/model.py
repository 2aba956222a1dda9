"""A decoder-only transformer; the letters behind names are shapes, told in blocks.py."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from sickbay.reference.models.blocks import Block, Rotation, make_norm, rotation_at
from sickbay.reference.models.cache import Cache, LayerCache
from sickbay.reference.models.config import Config
from sickbay.reference.models.initialise import initialise

Step = Callable[[Tensor, "Tensor | None", "Rotation | None", "LayerCache | None"], Tensor]
Through = Callable[[Sequence[Step], Tensor, "Tensor | None", "Rotation | None", Sequence["LayerCache | None"]], Tensor]


class LanguageModel(Protocol):
    """What generation asks of a model."""

    config: Config
    token_embedding: nn.Embedding
    training: bool

    def hidden(self, ids_BT: Tensor, documents: Tensor | None = None, cache: Cache | None = None) -> Tensor: ...

    def logits(self, hidden_BTD: Tensor) -> Tensor: ...

    def __call__(self, ids_BT: Tensor) -> Any: ...

    def train(self, mode: bool = True) -> Any: ...

    def eval(self) -> Any: ...


class Transformer(nn.Module):
    """`ids (B, T)` to next-token `logits (B, T, V)`, weights drawn from torch's current random state.

    `through` takes the residual stream through the blocks and may be replaced.
    """

    causal = True

    def __init__(self, config: Config) -> None:
        super().__init__()
        self.config = config
        self.token_embedding = nn.Embedding(config.vocab_size, config.dim)
        self.position_embedding = nn.Embedding(config.context, config.dim) if config.positions == "learned" else None
        self.dropout = nn.Dropout(config.dropout)
        self.blocks = nn.ModuleList(Block(config, self.causal) for _ in range(config.num_layers))
        self.through: Through = in_turn
        # A post-norm block ends in its own norm.
        self.final_norm = make_norm(config) if config.norm_place == "pre" else nn.Identity()
        self.head = nn.Linear(config.dim, config.vocab_size, bias=False)
        if config.tied_embeddings:
            self.head.weight = self.token_embedding.weight
        initialise(self, config, writes=2 * config.num_layers)

    def forward(self, ids_BT: Tensor, documents: Tensor | None = None, cache: Cache | None = None) -> Tensor:
        """Logits `(B, T, V)` for the token after each position of `ids_BT`; arguments and errors as of `hidden`."""
        return self.logits(self.hidden(ids_BT, documents, cache))

    def hidden(self, ids_BT: Tensor, documents: Tensor | None = None, cache: Cache | None = None) -> Tensor:
        """What the blocks make of `ids_BT` `(B, T)` int64, normalised: `(B, T, D)`.

        `documents` `(B, T)`: number of the document each token of a packed row belongs to, each a contiguous stretch;
        tokens then see their own document only and positions restart with it. `cache`: the positions before `ids_BT`, which
        are added to it; not together with `documents`. Raises ValueError beyond `config.context`.
        """
        held = 0 if cache is None else cache.length
        if ids_BT.dim() != 2 or held + ids_BT.shape[1] > self.config.context:
            shape = f"{tuple(ids_BT.shape)}" + (f" after {held} positions" if held else "")
            raise ValueError(f"ids have shape {shape}; they must be (rows, at most context={self.config.context} positions)")
        if cache is None:
            visible_B1TS = visibility(ids_BT, documents, self.config.pad_id, self.causal)
            positions = positions_of(ids_BT, documents, self.config.pad_id)
        else:
            visible_B1TS, positions = cache.begin(ids_BT, self.config.pad_id)
        x_BTD = self.token_embedding(ids_BT)
        rotation = None
        if self.position_embedding is not None:
            x_BTD = x_BTD + self.position_embedding(positions)
        else:
            rotation = rotation_at(positions, self.config)
        x_BTD = self.dropout(x_BTD)
        caches = [None] * len(self.blocks) if cache is None else cache.layers
        x_BTD = self.through(list(self.blocks), x_BTD, visible_B1TS, rotation, caches)
        normed_BTD: Tensor = self.final_norm(x_BTD)
        return normed_BTD

    def logits(self, hidden_BTD: Tensor) -> Tensor:
        """Logits `(B, T, V)` of `hidden`'s positions; generation asks for the last alone."""
        logits_BTV: Tensor = self.head(hidden_BTD)
        if self.config.logit_softcap is not None:
            logits_BTV = self.config.logit_softcap * torch.tanh(logits_BTV / self.config.logit_softcap)
        return logits_BTV


def in_turn(
    blocks: Sequence[Step],
    x_BTD: Tensor,
    visible_B1TS: Tensor | None,
    rotation: Rotation | None,
    caches: Sequence[LayerCache | None],
) -> Tensor:
    """The residual stream `(B, T, D)` behind the last of `blocks`; `caches`: one a block, None where nothing is remembered."""
    for block, cache in zip(blocks, caches):
        x_BTD = block(x_BTD, visible_B1TS, rotation, cache)
    return x_BTD


def visibility(ids_BT: Tensor, documents_BT: Tensor | None, pad_id: int | None, causal: bool = True) -> Tensor | None:
    """`(B, 1, T, T)`, True where query t may look at key s: same document, not padding, not later if `causal`. None = no other limit."""
    if documents_BT is None and pad_id is None:
        return None
    T = ids_BT.shape[1]
    visible_TT = torch.ones(T, T, dtype=torch.bool, device=ids_BT.device)
    visible_B1TT = (visible_TT.tril() if causal else visible_TT).expand(len(ids_BT), 1, T, T)
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
