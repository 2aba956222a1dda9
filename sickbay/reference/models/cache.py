"""Keys and values of the positions seen so far, in buffers made once: a token costs one position's work instead of all.

The letters behind names are shapes, told in blocks.py.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from sickbay.reference.models.config import Config


class LayerCache:
    """One layer's buffers `(B, G, positions, K)`; the first `length` positions are filled."""

    def __init__(self, keys: Tensor, values: Tensor) -> None:
        self.keys_BGSK, self.values_BGSK = keys, values
        self.length = 0

    def extend(self, key_BGTK: Tensor, value_BGTK: Tensor) -> tuple[Tensor, Tensor]:
        """Keys and values `(B, G, S, K)` of all positions so far, the new T last."""
        begin, count = self.length, key_BGTK.shape[2]
        self.length = begin + count
        self.keys_BGSK.narrow(2, begin, count).copy_(key_BGTK)
        self.values_BGSK.narrow(2, begin, count).copy_(value_BGTK)
        return self.keys_BGSK.narrow(2, 0, self.length), self.values_BGSK.narrow(2, 0, self.length)

    def select(self, rows_B: Tensor) -> None:
        """Row i holds what row `rows_B[i]` held; there may be more rows than before, or fewer."""
        self.keys_BGSK, self.values_BGSK = (self._selected(buffer, rows_B) for buffer in (self.keys_BGSK, self.values_BGSK))

    def _selected(self, buffer_BGSK: Tensor, rows_B: Tensor) -> Tensor:
        filled_BGSK = buffer_BGSK[:, :, : self.length].index_select(0, rows_B)
        if len(rows_B) != len(buffer_BGSK):
            buffer_BGSK = buffer_BGSK.new_empty(len(rows_B), *buffer_BGSK.shape[1:])
        buffer_BGSK[:, :, : self.length] = filled_BGSK
        return buffer_BGSK


class Cache:
    """The buffers of all layers for `rows` sequences, and which of their positions hold a token.

    `dtype` and `device` are those of the model's activations. `positions`: most that a row will hold, None = the context.
    `padding`: how many positions on the left of each row hold nothing, so that rows of different length end together.
    """

    def __init__(
        self,
        config: Config,
        rows: int,
        *,
        device: torch.device | str = "cpu",
        dtype: torch.dtype = torch.float32,
        positions: int | None = None,
        padding: Sequence[int] | None = None,
    ) -> None:
        positions = config.context if positions is None else min(positions, config.context)
        shape = (rows, config.kv_heads, positions, config.head_dim)
        self.layers = [
            LayerCache(torch.empty(shape, device=device, dtype=dtype), torch.empty(shape, device=device, dtype=dtype))
            for _ in range(config.num_layers)
        ]
        self._order_S = torch.arange(positions, device=device)
        self.clear(padding if padding is not None else [0] * rows)

    @property
    def length(self) -> int:
        """Positions held."""
        return self.layers[0].length

    def clear(self, padding: Sequence[int]) -> None:
        """Nothing is held; the next row's first positions are empty as `padding` says, one number a row."""
        for layer in self.layers:
            layer.length = 0
        empty_B1 = torch.tensor(padding, device=self._order_S.device)[:, None]
        self._real_BS = self._order_S >= empty_B1
        self._padded = any(padding)

    def select(self, rows_B: Tensor) -> None:
        """Row i goes on from what row `rows_B[i]` held; there may be more rows than before, or fewer."""
        for layer in self.layers:
            layer.select(rows_B)
        self._real_BS = self._real_BS[rows_B]

    def begin(self, ids_BT: Tensor, pad_id: int | None) -> tuple[Tensor | None, Tensor]:
        """(which positions each of `ids_BT` sees `(B, 1, T, S)`, None = all before and itself; their positions `(T,)` or `(B, T)`).

        Padding, whether told to `clear` or of the id `pad_id`, is seen by nobody and counts as no position.
        """
        begin, end = self.length, self.length + ids_BT.shape[1]
        index_T = self._order_S[begin:end]
        if pad_id is not None:
            self._real_BS[:, begin:end] &= ids_BT != pad_id
            self._padded = self._padded or not bool(self._real_BS[:, begin:end].all())
        positions = index_T
        if self._padded:
            positions = self._real_BS[:, :end].cumsum(1)[:, begin:] - self._real_BS[:, begin:end].long()
        elif begin == 0 or end - begin == 1:
            return None, positions
        order_S = self._order_S[:end]
        visible_B1TS = (order_S <= index_T[:, None]) & self._real_BS[:, None, None, :end]
        # Each position sees itself: a softmax over no key at all is 0/0.
        return visible_B1TS | (order_S == index_T[:, None]), positions
