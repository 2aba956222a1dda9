"""Activations computed a second time in the backward pass, so that they need not be kept: memory for about a third more time.

Without it a backward pass needs what every block computed. Of a segment of blocks only its input is kept; when the
gradient arrives the segment is computed again, with the same random state, so that dropout drops the same.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from sickbay.reference.models.blocks import Rotation
from sickbay.reference.models.cache import LayerCache
from sickbay.reference.models.encoder_decoder import EncoderDecoder
from sickbay.reference.models.kinds import Model
from sickbay.reference.models.model import Step, Through, in_turn
from sickbay.reference.settings.recipe import Recompute


def recompute(model: Model, kind: Recompute) -> None:
    """`model` keeps one input per block ("block"), or about sqrt(layers) of them ("sqrt", Chen et al. 2016), or all; gradients stay.

    "block" holds L inputs and one block's activations; "sqrt" about sqrt(L) inputs and sqrt(L) blocks' activations; of an encoder-decoder
    either side does.
    """
    for side in (model.encoder, model.decoder) if isinstance(model, EncoderDecoder) else (model,):
        length = round(math.sqrt(len(side.blocks)))
        side.through = {"none": in_turn, "block": in_segments(1), "sqrt": in_segments(length)}[kind]


def in_segments(length: int) -> Through:
    """The blocks in turn, `length` at a time, of which only the input is kept."""

    def through(
        blocks: Sequence[Step],
        x_BTD: Tensor,
        visible_B1TS: Tensor | None,
        rotation: Rotation | None,
        caches: Sequence[LayerCache | None],
    ) -> Tensor:
        if not torch.is_grad_enabled():
            return in_turn(blocks, x_BTD, visible_B1TS, rotation, caches)
        for begin in range(0, len(blocks), length):
            part = slice(begin, begin + length)
            x_BTD = checkpoint(in_turn, blocks[part], x_BTD, visible_B1TS, rotation, caches[part], use_reentrant=False)
        return x_BTD

    return through
