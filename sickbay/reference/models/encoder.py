"""A bidirectional encoder: the decoder's blocks without the causal triangle; the letters behind names are shapes, told in blocks.py."""

from __future__ import annotations

from torch import Tensor

from sickbay.reference.models.cache import Cache
from sickbay.reference.models.model import Transformer


class Encoder(Transformer):
    """`ids (B, T)` to `logits (B, T, V)` for the token that stands at each position, which sees all positions of its row or document.

    `hidden` gives one vector per position `(B, T, D)`. Trained to fill in masked tokens (objectives.MaskedToken) it is BERT (Devlin et
    al. 2019) without its segments and sentence pairs, which do not help (Liu et al. 2019, section 4.2).
    """

    causal = False

    def hidden(self, ids_BT: Tensor, documents: Tensor | None = None, cache: Cache | None = None) -> Tensor:
        """As the decoder's, but every position of a row depends on all others: a `cache` raises ValueError."""
        if cache is not None:
            raise ValueError("an encoder reads a row at once and takes no cache; a decoder does")
        return super().hidden(ids_BT, documents)
