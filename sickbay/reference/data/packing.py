"""Documents packed one after another into rows: what belongs to which, told by the id that ends each.

documents = documents_of(ids, tokenizer.end_of_text)
logits = model(ids, documents)
"""

from __future__ import annotations

import torch
from torch import Tensor

from sickbay.reference.training.loss import IGNORED


def documents_of(ids_BT: Tensor, end_of_text: int) -> Tensor:
    """Number of the document of each token in its row `(B, T)` int64, from 0; `end_of_text` belongs to the document that it ends."""
    ends_BT = ids_BT == end_of_text
    return ends_BT.cumsum(1) - ends_BT.long()


def within_documents(ids_BT: Tensor, targets_BT: Tensor, end_of_text: int) -> Tensor:
    """`targets_BT` `(B, T)` with -100, which the loss ignores, where the next token is another document's."""
    return torch.where(ids_BT == end_of_text, IGNORED, targets_BT)
