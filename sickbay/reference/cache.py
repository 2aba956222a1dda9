"""Keys and values of the positions seen so far, in buffers made once: a token costs one position's work instead of all.

The letters behind names are shapes, told in blocks.py.
"""

from __future__ import annotations

import torch
from torch import Tensor

from sickbay.reference.config import Config


class LayerCache:
    """One layer's buffers `(B, G, context, K)`; the first `length` positions are filled."""

    def __init__(self, keys: Tensor, values: Tensor) -> None:
        self.keys_BGSK, self.values_BGSK = keys, values
        self.length = 0

    def extend(self, key_BGTK: Tensor, value_BGTK: Tensor) -> tuple[Tensor, Tensor]:
        """Keys and values `(B, G, S, K)` of all positions so far, the new T last."""
        begin, self.length = self.length, self.length + key_BGTK.shape[2]
        self.keys_BGSK[:, :, begin : self.length] = key_BGTK
        self.values_BGSK[:, :, begin : self.length] = value_BGTK
        return self.keys_BGSK[:, :, : self.length], self.values_BGSK[:, :, : self.length]


class Cache:
    """The buffers of all layers for `rows` sequences, and which of their positions hold a token."""

    def __init__(self, config: Config, rows: int, *, device: torch.device | str = "cpu", dtype: torch.dtype = torch.float32) -> None:
        shape = (rows, config.kv_heads, config.context, config.head_dim)
        self.layers = [
            LayerCache(torch.empty(shape, device=device, dtype=dtype), torch.empty(shape, device=device, dtype=dtype))
            for _ in range(config.num_layers)
        ]
        self._real_BS = torch.ones(rows, config.context, dtype=torch.bool, device=device)
        self._before_B1 = torch.zeros(rows, 1, dtype=torch.int64, device=device)  # tokens so far, without padding
        self._padded = False

    @property
    def length(self) -> int:
        """Positions held."""
        return self.layers[0].length

    def begin(self, ids_BT: Tensor, pad_id: int | None) -> tuple[Tensor | None, Tensor]:
        """(which positions each of `ids_BT` sees `(B, 1, T, S)`, None = all before and itself; their positions `(T,)` or `(B, T)`).

        Padding is seen by nobody and counts as no position.
        """
        T, begin = ids_BT.shape[1], self.length
        index_T = torch.arange(begin, begin + T, device=ids_BT.device)
        if pad_id is None and not self._padded:
            positions = index_T
        else:
            real_BT = torch.ones_like(ids_BT, dtype=torch.bool) if pad_id is None else ids_BT != pad_id
            self._padded = self._padded or not bool(real_BT.all())
            self._real_BS[:, begin : begin + T] = real_BT
            positions = self._before_B1 + real_BT.cumsum(1) - real_BT.long()
            self._before_B1 += real_BT.sum(1, keepdim=True)
        if not self._padded and (T == 1 or begin == 0):
            return None, positions
        order_S = torch.arange(begin + T, device=ids_BT.device)
        visible_B1TS = (order_S <= index_T[:, None]) & self._real_BS[:, None, None, : begin + T]
        # Each position sees itself: a softmax over no key at all is 0/0.
        return visible_B1TS | (order_S == index_T[:, None]), positions
