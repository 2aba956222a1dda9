"""An encoder reads one text, a decoder writes another and looks at it; the letters behind names are shapes, told in blocks.py.

S counts the positions of the source, T those of the target.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import cast

import torch
from torch import Tensor, nn

from sickbay.reference.models.blocks import Attend, Attention, FeedForward, Rotation, attend_all, make_norm, rotation_at
from sickbay.reference.models.cache import Cache, LayerCache
from sickbay.reference.models.config import Config
from sickbay.reference.models.encoder import Encoder
from sickbay.reference.models.initialise import initialise
from sickbay.reference.models.model import Step, Through, in_turn, positions_of, visibility


@dataclass(frozen=True)
class Memory:
    """What the encoder made of the source: the keys and values `(B, G, S, K)` that each layer of the decoder looks at."""

    keys_values: list[tuple[Tensor, Tensor]]
    ids_BS: Tensor
    documents_BS: Tensor | None

    def rows(self, count: int) -> Memory:
        """The same for `count` rows of the target, where there is one source for all of them."""
        if len(self.ids_BS) == count or len(self.ids_BS) > 1:
            return self
        keys_values = [(key.expand(count, -1, -1, -1), value.expand(count, -1, -1, -1)) for key, value in self.keys_values]
        return Memory(keys_values, self.ids_BS.expand(count, -1), self.documents_BS)


class CrossAttention(nn.Module):
    """Queries of the target, keys and values of the source (Vaswani et al. 2017, section 3.2.3), without positions, as in T5."""

    def __init__(self, config: Config) -> None:
        super().__init__()
        self.num_heads, self.kv_heads, self.head_dim = config.num_heads, config.kv_heads, config.head_dim
        self.dropout = config.dropout
        self.query = nn.Linear(config.dim, config.dim, bias=config.bias)
        self.key_value = nn.Linear(config.dim, 2 * config.kv_heads * config.head_dim, bias=config.bias)
        self.output = nn.Linear(config.dim, config.dim, bias=config.bias)
        self.attend: Attend = attend_all

    @property
    def stack(self) -> tuple[int, ...]:
        """Rows of `key_value` that are keys and values."""
        return (self.kv_heads * self.head_dim,) * 2

    def keys_values(self, source_BSD: Tensor) -> tuple[Tensor, Tensor]:
        """Keys and values `(B, G, S, K)` of the source."""
        B, S, _ = source_BSD.shape
        heads_BXSK = self.key_value(source_BSD).view(B, S, 2 * self.kv_heads, self.head_dim).transpose(1, 2)
        key_BGSK, value_BGSK = heads_BXSK.split(self.kv_heads, dim=1)
        return key_BGSK, value_BGSK

    def forward(self, x_BTD: Tensor, key_BGSK: Tensor, value_BGSK: Tensor, visible_B1TS: Tensor | None) -> Tensor:
        B, T, _ = x_BTD.shape
        query_BHTK = self.query(x_BTD).view(B, T, self.num_heads, self.head_dim).transpose(1, 2)
        mixed_BHTK = self.attend(query_BHTK, key_BGSK, value_BGSK, visible_B1TS, self.dropout if self.training else 0.0)
        out_BTD: Tensor = self.output(mixed_BHTK.transpose(1, 2).flatten(2))
        return out_BTD


class CrossBlock(nn.Module):
    """A block that looks at the source between its attention and its feed-forward part; `(B, T, D)` to `(B, T, D)`."""

    def __init__(self, config: Config) -> None:
        super().__init__()
        self.pre = config.norm_place == "pre"
        self.attention_norm = make_norm(config)
        self.attention = Attention(config)
        self.cross_attention_norm = make_norm(config)
        self.cross_attention = CrossAttention(config)
        self.feed_forward_norm = make_norm(config)
        self.feed_forward = FeedForward(config)
        self.dropout = nn.Dropout(config.dropout)

    def forward(
        self,
        x_BTD: Tensor,
        visible_B1TT: Tensor | None,
        rotation: Rotation | None,
        source: tuple[Tensor, Tensor],
        source_visible_B1TS: Tensor | None,
        cache: LayerCache | None = None,
    ) -> Tensor:
        """`source`: its keys and values."""
        if self.pre:
            x_BTD = x_BTD + self.dropout(self.attention(self.attention_norm(x_BTD), visible_B1TT, rotation, cache))
            x_BTD = x_BTD + self.dropout(self.cross_attention(self.cross_attention_norm(x_BTD), *source, source_visible_B1TS))
            x_BTD = x_BTD + self.dropout(self.feed_forward(self.feed_forward_norm(x_BTD)))
        else:
            x_BTD = self.attention_norm(x_BTD + self.dropout(self.attention(x_BTD, visible_B1TT, rotation, cache)))
            x_BTD = self.cross_attention_norm(x_BTD + self.dropout(self.cross_attention(x_BTD, *source, source_visible_B1TS)))
            x_BTD = self.feed_forward_norm(x_BTD + self.dropout(self.feed_forward(x_BTD)))
        return x_BTD


class Decoder(nn.Module):
    """The target's side without embedding and head, which are the encoder's. `through`: as Transformer's."""

    def __init__(self, config: Config) -> None:
        super().__init__()
        self.position_embedding = nn.Embedding(config.context, config.dim) if config.positions == "learned" else None
        self.dropout = nn.Dropout(config.dropout)
        self.blocks = nn.ModuleList(CrossBlock(config) for _ in range(config.num_layers))
        self.through: Through = in_turn
        self.final_norm = make_norm(config) if config.norm_place == "pre" else nn.Identity()
        initialise(self, config, writes=3 * config.num_layers)


def looking(block: nn.Module, source: tuple[Tensor, Tensor], source_visible_B1TS: Tensor | None) -> Step:
    """`block` with what it sees of the source, to be called as a decoder-only model's block is."""

    def step(x_BTD: Tensor, visible_B1TT: Tensor | None, rotation: Rotation | None, cache: LayerCache | None) -> Tensor:
        seen_BTD: Tensor = block(x_BTD, visible_B1TT, rotation, source, source_visible_B1TS, cache)
        return seen_BTD

    return step


class EncoderDecoder(nn.Module):
    """`source (B, S)` and `target (B, T)` to `logits (B, T, V)` of the token after each position of the target.

    Both sides have `config.num_layers` blocks and share embedding and head (Raffel et al. 2020, section 2.1). The first id of a target
    is no part of the text: it says "begin".
    """

    def __init__(self, config: Config) -> None:
        super().__init__()
        self.config = config
        self.encoder = Encoder(config)
        self.decoder = Decoder(config)

    def forward(
        self,
        source_BS: Tensor,
        target_BT: Tensor,
        source_documents: Tensor | None = None,
        target_documents: Tensor | None = None,
    ) -> Tensor:
        """Logits `(B, T, V)`. Raises ValueError where either row is longer than `config.context`.

        `source_documents` `(B, S)` and `target_documents` `(B, T)`, both or neither: the number of the pair that each token of
        packed rows belongs to.
        """
        return self.decode(target_BT, self.encode(source_BS, source_documents), target_documents)

    def encode(self, source_BS: Tensor, documents: Tensor | None = None) -> Memory:
        """What `decode` needs of the source."""
        hidden_BSD = self.encoder.hidden(source_BS, documents)
        blocks = cast("list[CrossBlock]", self.decoder.blocks)
        return Memory([block.cross_attention.keys_values(hidden_BSD) for block in blocks], source_BS, documents)

    def decode(self, target_BT: Tensor, memory: Memory, documents: Tensor | None = None, cache: Cache | None = None) -> Tensor:
        """Logits `(B, T, V)`; arguments and errors as of `hidden`."""
        return self.encoder.logits(self.hidden(target_BT, memory, documents, cache))

    def hidden(self, target_BT: Tensor, memory: Memory, documents: Tensor | None = None, cache: Cache | None = None) -> Tensor:
        """What the decoder makes of the target, normalised: `(B, T, D)`.

        `cache`: the positions of the target before these, to which these are added. Raises ValueError beyond `config.context`.
        """
        config, held = self.config, 0 if cache is None else cache.length
        if target_BT.dim() != 2 or held + target_BT.shape[1] > config.context:
            shape = f"{tuple(target_BT.shape)}" + (f" after {held} positions" if held else "")
            raise ValueError(f"the target has shape {shape}; it must be (rows, at most context={config.context} positions)")
        if (documents is None) != (memory.documents_BS is None):
            raise ValueError("documents were given for one of source and target; give them for both or for neither")
        if cache is None:
            visible_B1TT = visibility(target_BT, documents, config.pad_id)
            positions = positions_of(target_BT, documents, config.pad_id)
        else:
            visible_B1TT, positions = cache.begin(target_BT, config.pad_id)
        source_visible_B1TS = visibility_of_source(target_BT, documents, memory, config.pad_id)
        x_BTD = self.encoder.token_embedding(target_BT)
        rotation = None
        if self.decoder.position_embedding is not None:
            x_BTD = x_BTD + self.decoder.position_embedding(positions)
        else:
            rotation = rotation_at(positions, config)
        x_BTD = self.decoder.dropout(x_BTD)
        caches: Sequence[LayerCache | None] = [None] * config.num_layers if cache is None else cache.layers
        blocks = [looking(block, source, source_visible_B1TS) for block, source in zip(self.decoder.blocks, memory.keys_values)]
        x_BTD = self.decoder.through(blocks, x_BTD, visible_B1TT, rotation, caches)
        normed_BTD: Tensor = self.decoder.final_norm(x_BTD)
        return normed_BTD

    def given(self, source_BS: Tensor, never: Sequence[int] = ()) -> Given:
        """A model of the target alone, for generate.generate: row b goes with row b of the source, or all rows with the only one.

        `never`: ids that are not chosen, such as padding.
        """
        return Given(self, source_BS, never)


class Given(nn.Module):
    """The decoder with its source fixed: what is generated from it is read and written as a decoder-only model's text is."""

    def __init__(self, model: EncoderDecoder, source_BS: Tensor, never: Sequence[int] = ()) -> None:
        super().__init__()
        self._never = list(never)
        self.model, self.config, self.token_embedding = model, model.config, model.encoder.token_embedding
        was_training = model.training
        model.eval()
        with torch.no_grad():
            self._memory = model.encode(source_BS)
        self.train(was_training)

    def hidden(self, ids_BT: Tensor, documents: Tensor | None = None, cache: Cache | None = None) -> Tensor:
        """As EncoderDecoder's; there are no `documents`."""
        return self.model.hidden(ids_BT, self._memory.rows(len(ids_BT)), documents, cache)

    def logits(self, hidden_BTD: Tensor) -> Tensor:
        logits_BTV = self.model.encoder.logits(hidden_BTD)
        logits_BTV[..., self._never] = -torch.inf
        return logits_BTV

    def forward(self, ids_BT: Tensor) -> Tensor:
        return self.logits(self.hidden(ids_BT))


def visibility_of_source(target_BT: Tensor, documents_BT: Tensor | None, memory: Memory, pad_id: int | None) -> Tensor | None:
    """`(B, 1, T, S)`, True where target position t may look at source position s: not padding, same pair. None = no limit."""
    if documents_BT is None and pad_id is None:
        return None
    B, S = memory.ids_BS.shape
    visible_B1TS = torch.ones(B, 1, target_BT.shape[1], S, dtype=torch.bool, device=target_BT.device)
    if documents_BT is not None and memory.documents_BS is not None:
        visible_B1TS = visible_B1TS & (documents_BT[:, None, :, None] == memory.documents_BS[:, None, None, :])
    if pad_id is not None:
        visible_B1TS = visible_B1TS & (memory.ids_BS != pad_id)[:, None, None, :]
    # Who has nothing to look at looks at everything: a softmax over no key at all is 0/0.
    return visible_B1TS | ~visible_B1TS.any(dim=-1, keepdim=True)
