"""What each of several processes keeps of a training step: arithmetic in bytes, no torch.

ddp    weights, gradients and moments whole, the activations of its own rows (Li et al. 2020, arXiv 2006.15704; gradients are views
       of the buckets that are exchanged, so the buckets cost nothing on top)
fsdp   weights, gradients and moments divided by the processes (ZeRO stage 3: Rajbhandari et al. 2020, arXiv 1910.02054, section 5),
       and on top what is gathered while it computes: the whole of one unit, not of the model (Zhao et al. 2023, arXiv 2304.11277,
       section 3.2), here the block under way and the one fetched ahead, and what is in no block
tp     the blocks' matrices divided, the rest whole, all rows; of a block's activations 10 of 34 parts are not divided (Korthikanti et
       al. 2022, arXiv 2205.05198, section 4.2: norms, dropouts and the inputs of what is divided)
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

from sickbay.core.plan import Parts

KINDS = ("ddp", "fsdp", "tp")
UNDIVIDED = 10 / 34  # of a block's activations
FETCHED = 2  # blocks gathered at once: the one that computes and the next


@dataclass(frozen=True)
class Weight:
    """A weight tensor. `width`: bytes of one value; `block`: number of the block it is in, None = in none."""

    shape: tuple[int, ...]
    width: int
    block: int | None
    trainable: bool = True

    @property
    def whole(self) -> int:
        """Bytes."""
        return math.prod(self.shape) * self.width

    def rows_dealt(self, processes: int) -> int:
        """Bytes of the largest part when the first axis is dealt out, the rows that do not come out even to the first."""
        if not self.shape:
            return self.width
        return math.ceil(self.shape[0] / processes) * math.prod(self.shape[1:]) * self.width


@dataclass(frozen=True)
class Share:
    """What one process keeps in a step of `rows` rows of its own, in bytes.

    `gathered`: weights and gradients that are whole for a moment; `peak`: the most alive at once.
    """

    kind: str
    processes: int
    rows: int
    weights: float
    gradients: float
    optimizer: float
    gathered: float
    activations: float
    logits: float
    peak: float


def share(kind: str, parts: Parts, weights: Sequence[Weight], processes: int, rows: int) -> Share:
    """What each of `processes` keeps of a step over `rows` rows in all, dealt out as `kind`, one of KINDS; the one that keeps most.

    `parts`: of one process by itself, for any number of rows.
    """
    own = rows if kind == "tp" else math.ceil(rows / processes)
    alone = parts.of_rows(own)
    deal = {"ddp": _whole, "fsdp": _dealt, "tp": _split}[kind]
    trainable = [weight for weight in weights if weight.trainable]
    (kept, gathered), (trained, _) = deal(weights, processes), deal(trainable, processes)
    every, _ = _whole(trainable, 1)
    buffers = alone.weights - _whole(weights, 1)[0]
    mine = replace(
        alone,
        weights=kept + buffers,
        gradients=trained,
        optimizer=alone.optimizer * trained / every if every else 0.0,
        blocks=tuple(block * (UNDIVIDED + (1 - UNDIVIDED) / processes) for block in alone.blocks) if kind == "tp" else alone.blocks,
        largest=alone.largest if kind == "ddp" else 0.0,
    )
    return Share(
        kind=kind,
        processes=processes,
        rows=own,
        weights=mine.weights,
        gradients=mine.gradients,
        optimizer=mine.optimizer,
        gathered=gathered,
        activations=mine.activations,
        logits=mine.logits,
        peak=mine.peak + gathered,
    )


def _whole(weights: Sequence[Weight], processes: int) -> tuple[int, int]:
    return sum(weight.whole for weight in weights), 0


def _dealt(weights: Sequence[Weight], processes: int) -> tuple[int, int]:
    """(bytes kept, bytes whole for a moment)."""
    if processes == 1:
        return _whole(weights, 1)
    outside = sum(weight.whole for weight in weights if weight.block is None)
    numbers = {weight.block for weight in weights if weight.block is not None}
    largest = max((sum(weight.whole for weight in weights if weight.block == number) for number in numbers), default=0)
    fetched = outside + min(FETCHED, len(numbers)) * largest
    gradients = outside + largest  # until they are added up over the processes
    return sum(weight.rows_dealt(processes) for weight in weights), fetched + gradients


def _split(weights: Sequence[Weight], processes: int) -> tuple[int, int]:
    def kept(weight: Weight) -> int:
        divided = weight.block is not None and len(weight.shape) >= 2
        return math.ceil(weight.whole / processes) if divided else weight.whole

    return sum(map(kept, weights)), 0
