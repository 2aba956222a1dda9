"""The weights before the first step."""

from __future__ import annotations

import math

from torch import Tensor, nn

from sickbay.reference.models.config import Config

STD = 0.02  # Radford et al. 2019 (GPT-2), section 2.3


def initialise(model: nn.Module, config: Config, writes: int) -> None:
    """All matrices of `model` are drawn anew from torch's random state and its biases are 0.

    "gpt2": normal(0, 0.02). "xavier": variance 2 / (inputs + outputs) (Glorot & Bengio 2010, eq. 12) of each matrix of the blocks,
    while embeddings and head, whose inputs are ids or classes and no sum, stay at 0.02. `writes`: how many times the residual
    stream is added to.
    """
    # Each write adds its variance to the stream. At 1/sqrt(writes) their sum keeps one write's size, however deep the model.
    depth = math.sqrt(writes)
    for name, weight in model.named_parameters():
        into_stream = name.endswith(("attention.output.weight", "feed_forward.down.weight"))
        shrink = depth if into_stream else 1.0
        if name.endswith("bias") or (into_stream and config.zero_outputs):
            nn.init.zeros_(weight)
        elif weight.dim() >= 2 and config.init == "xavier" and not name.endswith(("embedding.weight", "head.weight")):
            for matrix in stacked(name, weight.detach(), config):
                nn.init.xavier_normal_(matrix, gain=1 / shrink)
        elif weight.dim() >= 2:
            nn.init.normal_(weight, std=STD / shrink)


def stacked(name: str, weight: Tensor, config: Config) -> tuple[Tensor, ...]:
    """The matrices that lie one above the other in `weight`, as views: a stack's height is no matrix's number of outputs."""
    shared = config.kv_heads * config.head_dim
    heights: tuple[int, ...]
    if name.endswith("query_key_value.weight"):
        heights = (config.dim, shared, shared)
    elif name.endswith("key_value.weight"):
        heights = (shared, shared)
    else:
        heights = (len(weight),)
    views: tuple[Tensor, ...] = weight.split(heights)
    return views
