"""Tokens to batches, each known by its number: a run goes on from a step's number, without any state to save.

A batch is what the model reads and, last, what is asked of it: `*inputs, targets = batch`. Here that is `ids, targets`, both
`(B, T)` int64: targets are the next tokens, -100 where there is none to predict.
`rows`: the part of each batch's rows that one of several processes takes, slice(rank, None, processes); the batches are
the same whatever their number. `end_of_text`: where documents are packed, no target is another document's token.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from sickbay.reference.data.packing import within_documents
from sickbay.reference.data.shuffle import shuffled
from sickbay.reference.training.loss import IGNORED

Tokens = npt.NDArray[Any]
Batch = tuple[Tensor, ...]
ALL = slice(None)
AHEAD = 64  # batches
TRAIN_TENTHS = 9


def split(tokens: Tokens, part: str) -> Tokens:
    """The first nine tenths of `tokens` for "train", the rest for any other part."""
    cut = len(tokens) * TRAIN_TENTHS // 10
    return tokens[:cut] if part == "train" else tokens[cut:]


def demand_length(tokens: Tokens, context: int, part: str) -> None:
    """Raises ValueError unless `tokens` hold one window of `context` inputs and their targets."""
    if len(tokens) < context + 1:
        raise ValueError(
            f"the {part} split has {len(tokens)} tokens; context={context} needs at least {context + 1}: more text or a smaller context"
        )


def windows(tokens: Tokens, starts: npt.NDArray[np.int64], context: int, end_of_text: int | None = None) -> Batch:
    """Inputs and next-token targets `(len(starts), context)` int64, one row from each start. Raises IndexError beyond the tokens."""
    # One gather for all rows; a plain array, because a memmap's own indexing is several times slower.
    rows = torch.from_numpy(np.asarray(tokens)[starts[:, None] + np.arange(context + 1)].astype(np.int64))
    # Copies: `contiguous` of a single row would leave both in the same memory.
    ids_BT, targets_BT = (part.clone(memory_format=torch.contiguous_format) for part in (rows[:, :-1], rows[:, 1:]))
    return ids_BT, targets_BT if end_of_text is None else within_documents(ids_BT, targets_BT, end_of_text)


def random_batches(
    tokens: Tokens, context: int, batch_size: int, seed: int, first: int = 0, *, rows: slice = ALL, end_of_text: int | None = None
) -> Iterator[Batch]:
    """Endless batches from number `first` on, of windows at random places. Batch n depends on `seed` and n alone."""
    demand_length(tokens, context, "chosen")
    _demand_rows(batch_size, rows)
    for number in itertools.count(first):
        starts = np.random.default_rng((seed, number)).integers(0, len(tokens) - context, size=batch_size)
        yield windows(tokens, starts[rows], context, end_of_text)


def shuffled_batches(
    tokens: Tokens, context: int, batch_size: int, seed: int, first: int = 0, *, rows: slice = ALL, end_of_text: int | None = None
) -> Iterator[Batch]:
    """Endless batches from number `first` on, of windows that do not overlap: each once in an epoch, in an order of its own.

    Row r of the whole run is in epoch r // count; a batch may end one epoch and begin the next. Batch n depends on `seed`
    and n alone. Where the windows leave tokens over, each epoch begins at another of them, so that none is never seen.
    """
    demand_length(tokens, context, "chosen")
    _demand_rows(batch_size, rows)
    count, left_over = divmod(len(tokens) - 1, context)
    for number in itertools.count(first, AHEAD):
        # For many batches at once: a shuffle of twelve places takes as long as one of a thousand.
        run_rows = np.arange(number * batch_size, (number + AHEAD) * batch_size).reshape(AHEAD, batch_size)[:, rows]
        epochs, places = np.divmod(run_rows, count)
        starts = np.empty_like(places)
        for epoch in np.unique(epochs).tolist():
            here = epochs == epoch
            offset = np.random.default_rng((seed, epoch)).integers(0, left_over + 1)
            starts[here] = offset + context * shuffled(places[here], count, seed, epoch)
        for starts_B in starts:
            yield windows(tokens, starts_B, context, end_of_text)


def spread_batches(
    tokens: Tokens,
    context: int,
    batch_size: int,
    most_rows: int | None = None,
    *,
    rows: slice = ALL,
    end_of_text: int | None = None,
) -> Iterator[Batch]:
    """Windows that do not overlap, in order: every token but the first is a target once, the last row filled up with ignored ones.

    `most_rows`: only that many whole windows, evenly spread over `tokens`. Every process gets as many batches as the others;
    where there is no row left for it, one whose targets are all ignored.
    """
    demand_length(tokens, context, "chosen")
    starts = np.arange(0, len(tokens) - 1, context)
    if most_rows is not None and most_rows < (whole := (len(tokens) - 1) // context):
        starts = starts[np.linspace(0, whole - 1, most_rows).round().astype(np.int64)]
    last = len(tokens) - 1 - context
    for begin in range(0, len(starts), batch_size):
        batch = starts[begin : begin + batch_size]
        mine = batch[rows]
        none = len(mine) == 0
        mine = batch[:1] if none else mine
        # The last window would reach beyond the end: it is read further left, then moved.
        ids_BT, targets_BT = windows(tokens, np.minimum(mine, last), context, end_of_text)
        beyond = int(max(0, mine[-1] - last))
        if beyond:
            ids_BT[-1], targets_BT[-1] = ids_BT[-1].roll(-beyond), targets_BT[-1].roll(-beyond)
            ids_BT[-1, -beyond:], targets_BT[-1, -beyond:] = ids_BT[-1, 0], IGNORED
        yield ids_BT, torch.full_like(targets_BT, IGNORED) if none else targets_BT


def _demand_rows(batch_size: int, rows: slice) -> None:
    if len(range(batch_size)[rows]) == 0:
        raise ValueError(f"batch_size is {batch_size}; it must be at least the number of processes ({rows.step})")
