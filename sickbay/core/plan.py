"""Arithmetic of a training step's memory, of a model's size for its data, and of batch and schedule. Bytes, tokens and steps; no torch.

Peak of a step: weights and optimizer state stand all the time; activations fall while gradients rise during backward, block by block.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

BYTES = {"float32": 4, "bfloat16": 2, "float16": 2}
STATE_COPIES = {"adamw": 2.0, "adam": 2.0, "sgd": 0.0, "sgd-momentum": 1.0, "adafactor": 0.0, "lion": 1.0, "adamw-8bit": 0.5}
TOKENS_PER_PARAMETER = 20.0  # compute-optimal: Hoffmann et al. 2022 (arXiv 2203.15556), table 3
FLOPS_PER_TOKEN = 6.0  # per parameter, forward and backward: Kaplan et al. 2020 (arXiv 2001.08361), section 2.1
HEADROOM = 0.92  # of the memory that may be planned for; the rest goes to kernels' workspaces and fragmentation
WARMUP_SHARE = 0.01  # of the steps; Hoffmann et al. 2022 and GPT-3 (arXiv 2005.14165, appendix B) warm up over 0.1 to 2 %
WARMUP_LEAST = 10
FLOOR_SHARE = 0.1  # of the peak: Hoffmann et al. 2022, appendix B

# The guide's table: tokens of the data set, from and to, and the model it advises (width, layers), smallest and largest.
GUIDE_SIZES: tuple[tuple[float, float, tuple[int, int], tuple[int, int]], ...] = (
    (0, 1e6, (256, 4), (512, 6)),
    (1e6, 1e7, (512, 6), (768, 12)),
    (1e7, math.inf, (768, 12), (1024, 24)),
)


@dataclass(frozen=True)
class Parts:
    """What one step of `rows` rows keeps, in bytes.

    `blocks`: activations kept by each block, in order; `around`: those of embedding, final norm, head and loss; `boundary`: one block's
    input; `outputs`: the model's outputs that stay alive; `logits`: one copy of the logits; `largest`: the largest weight.
    """

    weights: float
    gradients: float
    optimizer: float
    blocks: tuple[float, ...]
    around: float
    boundary: float
    outputs: float
    logits: float
    largest: float = 0.0
    rows: int = 1

    @property
    def activations(self) -> float:
        return sum(self.blocks) + self.around

    @property
    def peak(self) -> float:
        """The most bytes alive at once in a step that is not the first."""
        standing = self.weights + self.optimizer + self.outputs
        share = self.gradients / max(len(self.blocks) + 1, 1)
        # The gradients of log-softmax and of what it is picked from are both as large as the logits.
        moments = [self.activations + 2 * self.logits]
        left, made = sum(self.blocks), share
        moments.append(left + made)
        for block in reversed(self.blocks):
            made += share
            moments.append(left + made)
            left -= block
        return standing + max(*moments, self.gradients + self.largest)

    def of_rows(self, rows: int) -> Parts:
        """The same for another number of rows: activations, outputs and logits in proportion."""
        factor = rows / self.rows
        return replace(
            self,
            rows=rows,
            blocks=tuple(block * factor for block in self.blocks),
            around=self.around * factor,
            boundary=self.boundary * factor,
            outputs=self.outputs * factor,
            logits=self.logits * factor,
        )

    def checkpointed(self, every: int) -> Parts:
        """With only each segment's input kept, and one segment of `every` blocks recomputed at a time (Chen et al. 2016, 1604.06174)."""
        segments = [self.blocks[i : i + every] for i in range(0, len(self.blocks), every)]
        worst = max((sum(segment) for segment in segments), default=0.0)
        kept = tuple([self.boundary] * (len(segments) - 1) + [worst]) if segments else ()
        return replace(self, blocks=kept)

    def with_optimizer(self, name: str) -> Parts:
        """With the state that optimizer `name` (a key of STATE_COPIES) keeps: copies of the trainable weights in float32."""
        return replace(self, optimizer=self.gradients * STATE_COPIES[name])

    def in_half(self) -> Parts:
        """Activations in 16 bits under autocast: about half; weights, gradients and optimizer state stay in float32."""
        half = tuple(block / 2 for block in self.blocks)
        return replace(self, blocks=half, boundary=self.boundary / 2, around=self.around / 2 + self.logits / 2)


@dataclass(frozen=True)
class Fit:
    """A way to train in the memory there is. `batch` = `rows` x `accumulation`; `checkpoint_every`: blocks, 0 = none."""

    rows: int
    accumulation: int
    checkpoint_every: int
    half: bool
    optimizer: str
    peak: float

    def __str__(self) -> str:
        words = [f"micro-batch {self.rows} x {self.accumulation} accumulation"]
        if self.checkpoint_every:
            words.append(f"checkpointing every {self.checkpoint_every} block{'s' if self.checkpoint_every > 1 else ''}")
        if self.half:
            words.append("bfloat16 autocast")
        if self.optimizer:
            words.append(f"{self.optimizer} instead of Adam")
        return ", ".join(words) + f": {gibibytes(self.peak)}"


def best_segment(parts: Parts) -> int:
    """Blocks per checkpoint for which the peak is least; the square root of the number of blocks where they are alike."""
    choices = range(1, len(parts.blocks) + 1)
    return min(choices, key=lambda every: (parts.checkpointed(every).peak, every), default=0)


def fits(parts: Parts, batch: int, limit: float, headroom: float = HEADROOM) -> list[Fit]:
    """Ways to train batches of `batch` rows in `limit` bytes, the gentlest first; empty if not even one row fits any way."""
    room = limit * headroom
    half_optimizer = "sgd-momentum" if parts.optimizer > parts.gradients else ""
    found: list[Fit] = []
    for optimizer in ("", "adamw-8bit", half_optimizer) if half_optimizer else ("",):
        changed = parts.with_optimizer(optimizer) if optimizer else parts
        for half in (False, True):
            for checkpoint in (False, True):
                every = best_segment(changed) if checkpoint else 0
                one = changed.in_half() if half else changed
                one = one.checkpointed(every) if every else one
                rows = _most_rows(one, batch, room)
                if rows:
                    found.append(Fit(rows, math.ceil(batch / rows), every, half, optimizer, one.of_rows(rows).peak))
        if found:
            break
    keep: list[Fit] = []
    for fit in found:
        if not keep or fit.rows > max(known.rows for known in keep):
            keep.append(fit)
    return keep


def _most_rows(parts: Parts, batch: int, room: float) -> int:
    """The largest divisor of `batch`, or power of two below it, whose peak is within `room`; 0 if one row is too many."""
    choices = {d for d in range(1, batch + 1) if batch % d == 0} if batch <= 65_536 else {1 << k for k in range(batch.bit_length())}
    return max((rows for rows in choices if parts.of_rows(rows).peak <= room), default=0)


def compute_optimal(tokens: float) -> float:
    """Parameters for which one pass over `tokens` is compute-optimal."""
    return tokens / TOKENS_PER_PARAMETER


def guide_size(tokens: float) -> tuple[tuple[int, int], tuple[int, int]]:
    """The guide's advice for a data set of `tokens`: (width, layers), smallest and largest."""
    return next((small, large) for low, high, small, large in GUIDE_SIZES if low <= tokens < high)


def body_parameters(dim: int, layers: int) -> float:
    """Parameters of `layers` blocks of width `dim` without embeddings: 12 L D^2 (Kaplan et al. 2020, section 2.1)."""
    return 12.0 * layers * dim * dim


@dataclass(frozen=True)
class Schedule:
    """Linear warm-up to `peak`, cosine to `floor` at `steps`, clamped there. Learning rates per step."""

    steps: int
    warmup: int
    peak: float
    floor: float

    def at(self, step: int) -> float:
        if step < self.warmup:
            return self.peak * (step + 1) / self.warmup
        progress = min(1.0, (step - self.warmup) / max(1, self.steps - self.warmup))
        return self.floor + (self.peak - self.floor) * 0.5 * (1 + math.cos(math.pi * progress))


def schedule(steps: int, peak: float) -> Schedule:
    """Warm-up over one per cent of the steps, ten at least and a tenth at most, and a floor of a tenth."""
    warmup = min(max(WARMUP_LEAST, round(WARMUP_SHARE * steps)), max(1, steps // 10))
    return Schedule(steps, warmup, peak, peak * FLOOR_SHARE)


def peak_learning_rate(parameters: float) -> float:
    """A first guess for AdamW by size, as log-linear interpolation of GPT-3's table 2.1 (125M: 6e-4, 1.3B: 2e-4, 175B: 0.6e-4)."""
    known: Sequence[tuple[float, float]] = ((1e6, 1e-3), (1.25e8, 6e-4), (1.3e9, 2e-4), (6.7e9, 1.2e-4), (1.75e11, 0.6e-4))
    if parameters <= known[0][0]:
        return known[0][1]
    for (small, high), (large, low) in itertools.pairwise(known):
        if parameters <= large:
            share = math.log(parameters / small) / math.log(large / small)
            return math.exp(math.log(high) + share * math.log(low / high))
    return known[-1][1]


def gibibytes(size: float) -> str:
    """`size` bytes in the unit that suits them."""
    for unit, scale in (("GiB", 1 << 30), ("MiB", 1 << 20), ("KiB", 1 << 10)):
        if size >= scale:
            return f"{size / scale:,.{2 if size < 10 * scale else 1}f} {unit}"
    return f"{size:.0f} B"
