"""Change some token embeddings of a repeated forward and measure which outputs change."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from sickbay.exams.sequences import _LOOKUPS, SOFTMAX, Lookup, Observation, Rerun, distinct, float_leaves, lookup_of, loss_of
from sickbay.exams.targets import Alignment
from sickbay.exams.trace import Intercept, Operation

CLASSES = 2048  # looked at per answer; a change of the hidden state moves all classes, so a part of a large vocabulary shows it
NOISE = 1e-6  # share of the own change below which a float32 difference may be rounding (kernels pick another order of summation)
_MIXING = (
    *SOFTMAX,
    "bmm",
    "convolution",
    "mean",
    "sum",
    "cumsum",
    "var_mean",
    "var",
    "std",
    "native_batch_norm",
    "roll",
    "flip",
    "_fft_r2c",
    "mm",
    "einsum",
)


@dataclass
class Tokens:
    """One token input in the order the exams use. `ids`, `padding`: `(B, T)`; `axis`: time axis of the look-up's own `(A0, A1)` ids."""

    group: list[Lookup]
    ids: Tensor
    axis: int
    padding: Tensor
    seed: int = 0

    @classmethod
    def of(cls, group: list[Lookup], axis: int, padding: Tensor | None = None) -> Tokens:
        ids = group[0].ids if axis == 1 else group[0].ids.t()
        return cls(group, ids, axis, torch.zeros_like(ids, dtype=torch.bool) if padding is None else padding)

    def first(self, rows: int) -> Tokens:
        """The same tokens of the first `rows` rows."""
        return Tokens(self.group, self.ids[:rows], self.axis, self.padding[:rows], self.seed)

    def others(self) -> Tensor | None:
        """Another valid token for every position `(B, T)`, drawn from the real tokens; None if there is only one."""
        pool = distinct(self.ids[~self.padding])
        if len(pool) < 2:
            return None
        draw = torch.Generator().manual_seed(self.seed)
        step = torch.randint(1, len(pool), self.ids.shape, generator=draw)
        other: Tensor = pool[(torch.bucketize(self.ids, pool) + step) % len(pool)]
        return other


def replacing(tokens: Tokens, where: Tensor) -> Intercept:
    """An intercept under which the positions `where` (bool `(B, T)`) are embedded as other tokens; ids, and masks made of them, stay."""
    occurrences = {lookup.occurrence for lookup in tokens.group}
    others = tokens.others()
    if others is None:
        raise ValueError("only one distinct token: nothing to replace it by")
    new, mask = (others, where) if tokens.axis == 1 else (others.t(), where.t())
    counter = [0]

    def intercept(operation: Operation, result: Any) -> Any:
        found = lookup_of(operation) if operation.name in _LOOKUPS else None
        if found is None:
            return result
        counter[0] += 1
        if counter[0] - 1 not in occurrences:
            return result
        table, shape = found[0], result.shape[:-1]
        chosen, ids = mask.reshape(shape), new.reshape(shape)
        changed = result if operation.name == "scatter_" else result.clone()
        rows = torch.nn.functional.one_hot(ids[chosen], result.shape[-1]) if table is None else table[ids[chosen]]
        changed[chosen] = rows.to(result.dtype)
        return changed

    return intercept


@dataclass
class Readout:
    """Where the answers are read: the `occurrence`-th loss inside the forward, else the output's `leaf`-th float tensor.

    `axes`: how to bring it to `(B, T, C)`: a permutation "01", "10", "02" (classes second), "flat01", "flat10", "pooled",
    or "placed": row n belongs at `index[n]` of the flattened `(B, T)`.
    """

    loss: int | None
    leaf: int
    axes: str
    grid: tuple[int, int]
    index: Tensor | None = None

    def bring(self, raw: Tensor, rows: int | None) -> Tensor:
        """`raw` as `(B, T, C)` float64, of many classes only some; `rows` when fewer rows than `grid` says were run."""
        brought = self._brought(raw.detach(), rows)
        return brought[..., :: max(1, brought.shape[-1] // CLASSES)].double()

    def _brought(self, raw: Tensor, rows: int | None) -> Tensor:
        batch, times = self.grid if rows is None else (rows, self.grid[1])
        if self.axes == "pooled":
            return raw.reshape(batch, 1, -1)
        if self.axes == "placed":
            assert self.index is not None
            whole = raw.new_zeros(batch * times, raw.shape[-1])
            whole[self.index] = raw.reshape(len(self.index), -1)
            return whole.reshape(batch, times, -1)
        if self.axes == "02":
            return raw.movedim(1, -1)
        if self.axes == "20":
            return raw.movedim(1, -1).transpose(0, 1)
        if self.axes == "flat01":
            return raw.reshape(batch, times, -1)
        if self.axes == "flat10":
            return raw.reshape(times, batch, -1).transpose(0, 1)
        return raw.flatten(2) if self.axes == "01" else raw.transpose(0, 1).flatten(2)

    def read(self, again: Rerun, intercept: Intercept | None = None) -> Tensor:
        """The forward run again under `intercept`: its answers `(B, T, C)`. Raises RuntimeError if they are not there."""
        kept: list[Tensor] = []

        def watching(operation: Operation, result: Any) -> Any:
            found = loss_of(operation) if lookup_of(operation) is None else None
            if found is not None and found[1].numel() > 0:
                kept.append(found[0].detach().clone())
            return intercept(operation, result) if intercept else result

        if self.loss is not None:
            again(watching)
            raw = kept[self.loss]
        else:
            raw = float_leaves(again(intercept))[self.leaf]
        return self.bring(raw, again.rows)


def find_readout(
    seen: Observation, aligned: Alignment | None, loss: int | None, batch: int, times: int, index: Tensor | None = None, axis: int = 1
) -> Readout | None:
    """Where to read the answers per position (or per row: "pooled"); None if no output has a row for each of the `batch`.

    `axis`: time axis of the ids, whose order a flattened output keeps.
    """
    if loss is not None:
        logits = seen.losses[loss].logits
        if aligned is not None and index is not None:
            # From the order of ids that run (T, B) to that of the exams.
            ordered: Tensor = (index % batch) * times + index // batch if aligned.time_axis == 0 else index
            return Readout(loss, 0, "placed", (batch, times), ordered)
        if aligned is not None:
            flat = "flat10" if aligned.flipped != (aligned.time_axis == 0) else "flat01"
            return Readout(loss, 0, flat, (aligned.values.shape[0], aligned.values.shape[1]))
        if logits.shape[0] == batch and logits.dim() == 2:
            return Readout(loss, 0, "pooled", (batch, 1))
    shapes = [tuple(leaf.shape) for leaf in float_leaves(seen.output)]
    for fits in (_per_position, _per_row):
        for leaf, shape in enumerate(shapes):
            axes = fits(shape, batch, times)
            if axes == "flat01" and (aligned.flipped != (aligned.time_axis == 0) if aligned is not None else axis == 0):
                axes = "flat10"
            if axes:
                return Readout(None, leaf, axes, (batch, times if axes != "pooled" else 1))
    return None


def _per_position(shape: tuple[int, ...], batch: int, times: int) -> str:
    if len(shape) >= 3 and shape[:2] == (batch, times):
        return "01"
    if len(shape) == 3 and shape[:2] == (times, batch):
        return "10"
    if len(shape) == 3 and (shape[0], shape[2]) == (batch, times):
        return "02"
    return "flat01" if len(shape) == 2 and shape[0] == batch * times and batch > 1 else ""


def _per_row(shape: tuple[int, ...], batch: int, times: int) -> str:
    return "pooled" if shape[0] == batch and len(shape) <= 2 and shape != (batch, times) else ""


def change(before: Tensor, after: Tensor) -> Tensor:
    """`(B, T, C)` twice -> the largest difference at each position, `(B, T)`; a value not finite on either side counts as unchanged."""
    difference = (after - before).abs()
    return torch.where(torch.isfinite(before) & torch.isfinite(after), difference, torch.zeros_like(difference)).amax(-1)


def locate(again: Rerun, tokens: Tokens, where: Tensor, kept: Tensor) -> tuple[str, str]:
    """(module, source) of the first operation after which positions `kept` change although only `where` was changed; else ("", "")."""
    baseline, perturbed = _Fingerprints(tokens), _Fingerprints(tokens)
    again(baseline)
    inner = replacing(tokens, where)
    again(lambda operation, result: perturbed(operation, inner(operation, result)))
    since: list[tuple[str, str]] = []
    for (prints, module, source, _), (others, _, _, mixing) in zip(baseline.events, perturbed.events):
        difference = (prints - others).abs()
        since.extend(mixing)
        own = difference[where].max() if bool(where.any()) else difference.max()
        if bool((difference[kept] > 1e-5 * max(float(own), 1e-12)).any()) and bool((difference[kept] > 1e-9).any()):
            softmax = [line for name, line in since if name in SOFTMAX]
            line = softmax[-1] if softmax else since[0][1] if since else source
            return module, again.source(line)
        since = []
    return "", ""


class _Fingerprints:
    """An intercept that keeps one number per position of every `(B, T, C)` result, and the mixing operations seen before it."""

    def __init__(self, tokens: Tokens) -> None:
        self._axis, self._shape = tokens.axis, tuple(tokens.ids.shape) if tokens.axis == 1 else tuple(tokens.ids.t().shape)
        self.events: list[tuple[Tensor, str, str, list[tuple[str, str]]]] = []
        self._mixing: list[tuple[str, str]] = []

    def __call__(self, operation: Operation, result: Any) -> Any:
        if operation.name in _MIXING:
            self._mixing.append((operation.name, operation.source))
        if operation.name.startswith(("empty", "new_empty")):  # whatever lay in that memory
            return result
        if isinstance(result, Tensor) and result.dim() == 3 and tuple(result.shape[:2]) == self._shape and result.is_floating_point():
            channels = result.shape[2]
            # (B, T, T) may be scores between positions; what a norm or a linear layer gives is positions for certain
            if channels != self._shape[self._axis] or operation.name in ("native_layer_norm", "_unsafe_view", "view"):
                direction = torch.linspace(0.5, 1.5, channels, dtype=torch.float64).cos()
                prints = torch.nan_to_num(result.detach().double()) @ direction
                self.events.append((prints if self._axis == 1 else prints.t(), operation.module, operation.source, self._mixing))
                self._mixing = []
        return result
