"""How much one part of the input moves one part of the output: future on past, past on future, row on row, padding on text."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from sickbay.exams.perturbation import NOISE, Readout, Tokens, change, locate, replacing
from sickbay.exams.sequences import Rerun

SETTLED_STEP = 5  # by then an output projection that began at zero has moved
WORTH_LOCATING = 1e-5
MOST = 1e3  # the ratio where only padding is seen: its mask is the wrong way round
AFFECTED = 1e-4  # share of the own change from which a position counts as affected


@dataclass
class View:
    """One token input and the answers read over it, with the baseline that every change is measured against.

    `counted`: bool `(B, n)`, answers the loss counts; `real`: bool `(B, n)`, answers at real tokens; `documents`: int64 `(B, n)` or None;
    `baseline`: `(B, n, C)`. `n` is T, or fewer where the loss drops ends, or 1 where rows are pooled (`per_position` False).
    `attention`: (module, source) of the first softmax over positions.
    """

    again: Rerun
    tokens: Tokens
    readout: Readout
    counted: Tensor
    real: Tensor
    documents: Tensor | None
    baseline: Tensor
    step: int
    attention: tuple[str, str] = ("", "")

    @property
    def per_position(self) -> bool:
        return self.readout.axes != "pooled"

    def effect(self, tokens: Tokens, where: Tensor) -> Tensor:
        """The change of each answer `(B, n)` when the positions `where` `(B, T)` are embedded as other tokens."""
        return change(self.baseline, self.readout.read(self.again, replacing(tokens, where)))

    def may_start_at_zero(self) -> bool:
        """True while a weight or gate is still all zero, so that nothing can pass through it yet."""
        module = self.again.module
        if self.step >= SETTLED_STEP:
            return False
        if module is None:
            return self.step == 0
        return any(not name.endswith("bias") and not bool(p.detach().any()) for name, p in module.named_parameters())

    def place(self, tokens: Tokens, where: Tensor, kept: Tensor, value: float) -> tuple[str, str]:
        """(module, source) of the operation that carries `where` into `kept` (`(B, T)`); ("", the call) if it is small."""
        if not value > WORTH_LOCATING:
            return "", self.again.source("")
        module, source = locate(self.again, tokens, where, kept)
        return module, source or self.again.source("")


def batch_norm_of(again: Rerun) -> dict[str, bool]:
    """{"batch_norm": True} for a model that mixes rows by design, with torch's batch-norm or one written by hand; otherwise empty."""
    module = again.module
    own = module is not None and any(isinstance(m, nn.modules.batchnorm._BatchNorm) and m.training for m in module.modules())
    return {"batch_norm": True} if own or again.batch_statistics else {}


@dataclass
class Mixing:
    """Who sees whom. `future`, `rows`: ratios, None where they could not be told; `cut`: position of the worst case."""

    future: float | None = None
    affected: float = 0.0
    cut: int = 0
    where: Tensor | None = None
    rows: float | None = None
    rows_where: Tensor | None = None
    alive: bool = False


def even_rows(batch: int) -> Tensor:
    """bool `(B, 1)`, True for rows 0, 2, 4, ...; the only row of a batch of one is even."""
    return (torch.arange(batch) % 2 == 0)[:, None]


def future_and_rows(view: View) -> Mixing:
    """Positions from a cut on are changed in even rows: what moves before the cut, and what moves in odd rows."""
    found = Mixing()
    batch, length = view.tokens.ids.shape
    even = even_rows(batch)
    for cut in _cuts(view, length):
        where = ((torch.arange(length) >= cut) & even) & ~view.tokens.padding
        effect = view.effect(view.tokens, where)
        answers = torch.arange(effect.shape[1])[None]
        behind = even & ((answers >= cut) | (not view.per_position))
        own = _mean(effect, behind & view.real) or _mean(effect, behind)
        if own == 0.0:
            continue
        found.alive = True
        if batch > 1:
            rows = float(effect[~even[:, 0]].mean(0).max()) / own
            if found.rows is None or rows > found.rows:
                found.rows, found.rows_where = rows, where
        ahead = even & (answers < cut) & view.counted & view.real
        if view.per_position and bool(ahead.any()):
            columns = (effect * ahead).sum(0) / ahead.sum(0).clamp(min=1)
            future = float(columns.max()) / own
            if found.future is None or future > found.future:
                affected = float((columns > AFFECTED * own).sum()) / int((ahead.sum(0) > 0).sum())
                found.future, found.affected, found.cut, found.where = future, affected, cut, where
    return found


def _cuts(view: View, length: int) -> list[int]:
    if not view.per_position:
        return [0]
    columns = (view.counted & view.real)[::2].any(0).nonzero().flatten().tolist()
    if not columns or length < 2:
        return []
    low, high = columns[0], min(columns[-1], length - 1)
    return sorted({min(length - 1, max(low + 1, low + math.ceil((high - low + 1) * share))) for share in (1 / 3, 2 / 3)})


@dataclass
class Past:
    """`pairs` (changed, later) looked at; `blocked`: share whose later answer did not move at all; `nearest`: of adjacent ones."""

    pairs: int
    blocked: float
    nearest: float
    span: int


def past(view: View) -> Past | None:
    """One position per row is changed, twice: which later counted answers of the row stay as they were. None without such pairs.

    A change that moves no answer by more than rounding says nothing of who sees whom: all that enters may fade on its way.
    """
    batch, length = view.tokens.ids.shape
    answers = torch.arange(view.counted.shape[1])
    asked = view.counted & view.real
    rounding = NOISE * float(torch.nan_to_num(view.baseline, 0.0, 0.0, 0.0).abs().max())
    pairs = still = nearest = nearest_still = span = 0
    for run in range(2):
        where = torch.zeros(batch, length, dtype=torch.bool)
        chosen: list[tuple[int, int]] = []
        for row in range(batch):
            last = int(asked[row].nonzero().max()) if bool(asked[row].any()) else 0
            sources = (~view.tokens.padding[row, :last]).nonzero().flatten().tolist()
            if sources:
                position = sources[(2 * row + run) * len(sources) // (2 * batch)]
                where[row, position] = True
                chosen.append((row, position))
        if not chosen:
            return None
        effect = view.effect(view.tokens, where)
        for row, position in chosen:
            later = asked[row] & (answers > position)
            if view.documents is not None:
                later &= view.documents[row] == view.documents[row, min(position, len(answers) - 1)]
            moved = effect[row] > 0
            if not bool(later.any()) or not bool((effect[row] > rounding).any()):
                continue
            pairs += int(later.sum())
            still += int((later & ~moved).sum())
            if position + 1 < len(answers) and bool(later[position + 1]):
                nearest += 1
                nearest_still += int(not moved[position + 1])
            reached = (later & moved).nonzero().flatten()
            span = max(span, int(reached.max()) - position if len(reached) else 0)
    return Past(pairs, still / pairs, nearest_still / nearest if nearest else 0.0, span) if pairs else None


def padding_influence(view: View, tokens: Tokens, main: bool) -> tuple[float, Tensor, Tensor] | None:
    """(ratio, changed, kept: bool `(B, T)`) of changing padding over changing real tokens, MOST at most; None if nothing moves."""
    asked = view.counted & view.real if view.per_position else torch.ones_like(view.counted)
    even = even_rows(tokens.ids.shape[0])
    if not bool((tokens.padding & even).any()):
        even = ~even
    padded = even & tokens.padding.any(1, keepdim=True) & asked.any(1, keepdim=True)
    if not bool(padded.any()):
        return None
    moved = _mean(view.effect(tokens, padded & tokens.padding), padded & asked)
    own = _mean(view.effect(tokens, padded & ~tokens.padding), padded & asked)
    if own == 0.0 and moved == 0.0:
        return None
    return moved / max(own, moved / MOST), padded & tokens.padding, padded & ~tokens.padding


def packing_influence(view: View) -> tuple[float, Tensor, Tensor, int] | None:
    """(ratio, changed, kept, boundaries): even rows' first document is changed; what moves in later ones over what moves in it."""
    documents = view.documents
    if documents is None:
        return None
    batch, length = view.tokens.ids.shape
    whole = torch.full((batch, length), -1)
    whole[:, : documents.shape[1]] = documents
    even = even_rows(batch) & (documents.max(1, keepdim=True).values > 0)
    if not bool(even.any()):
        even = documents.max(1, keepdim=True).values > 0
    where = even & (whole == 0)
    effect = view.effect(view.tokens, where)
    own = _mean(effect, even & (documents == 0))
    others = even & (documents > 0) & view.counted
    if own == 0.0 or not bool(others.any()):
        return None
    return _mean(effect, others) / own, where, even & (whole > 0), int(documents.max(1).values.clamp(min=0).sum())


def _mean(effect: Tensor, mask: Tensor) -> float:
    mask = mask.expand_as(effect)
    return float(effect[mask].mean()) if bool(mask.any()) else 0.0
