"""The kinds of model by name, as a checkpoint keeps them."""

from __future__ import annotations

from typing import Any

from sickbay.reference.models.config import Config
from sickbay.reference.models.encoder import Encoder
from sickbay.reference.models.encoder_decoder import EncoderDecoder
from sickbay.reference.models.model import Transformer
from sickbay.reference.settings.recipe import Objective

Model = Transformer | EncoderDecoder
DECODER, ENCODER, ENCODER_DECODER = "decoder", "encoder", "encoder-decoder"
KINDS: dict[str, Any] = {ENCODER_DECODER: EncoderDecoder, ENCODER: Encoder, DECODER: Transformer}  # what is a subclass comes first
OF_OBJECTIVE: dict[Objective, str] = {
    "next-token": DECODER,
    "masked-token": ENCODER,
    "span-corruption": ENCODER_DECODER,
    "pairs": ENCODER_DECODER,
}


def kind_of(model: Model) -> str:
    """The name of the model's kind, however torch has wrapped it.

    An encoder has a decoder's weights under the same names: only this tells them apart.
    """
    return next(name for name, kind in KINDS.items() if isinstance(model, kind))


def model_for(objective: Objective, config: Config) -> Model:
    """A model of the kind that `objective` trains, its weights drawn from torch's current random state."""
    model: Model = KINDS[OF_OBJECTIVE[objective]](config)
    return model
