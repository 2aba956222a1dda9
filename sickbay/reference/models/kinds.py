"""The kinds of model by name, as a checkpoint keeps them."""

from __future__ import annotations

from typing import Any

from sickbay.reference.models.encoder import Encoder
from sickbay.reference.models.encoder_decoder import EncoderDecoder
from sickbay.reference.models.model import Transformer

Model = Transformer | EncoderDecoder
DECODER = "decoder"
KINDS: dict[str, Any] = {"encoder-decoder": EncoderDecoder, "encoder": Encoder, DECODER: Transformer}  # what is a subclass comes first


def kind_of(model: Model) -> str:
    """The name of the model's kind, however torch has wrapped it.

    An encoder has a decoder's weights under the same names: only this tells them apart.
    """
    return next(name for name, kind in KINDS.items() if isinstance(model, kind))
