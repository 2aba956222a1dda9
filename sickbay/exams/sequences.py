"""What a repeated forward says about its sequences: token lookups, losses inside it, position hints. For use inside a forked copy."""

from __future__ import annotations

import random
import sys
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from sickbay.exams.trace import Intercept, ModulePath, Operation, Tracer, batch_size, rerun
from sickbay.patient import ForwardCall, bare, mapped, tensors_in, user_line

_LOOKUPS = ("embedding", "index", "index_select", "scatter_", "scatter")
SOFTMAX = (
    "_softmax",
    "_safe_softmax",
    "_scaled_dot_product_flash_attention_for_cpu",
    "_scaled_dot_product_efficient_attention",
    "_scaled_dot_product_flash_attention",
    "_scaled_dot_product_fused_attention_overrideable",
)
_SPREADS = ("var", "std", "var_mean", "std_mean")
_RECENT = 24  # results kept before a loss: between the output layer and the loss lie a handful of views, a mask and a softmax
_HALF = (torch.float16, torch.bfloat16)


@dataclass
class Lookup:
    """One look-up of a table's rows by ids, the `occurrence`-th of the forward. `ids`: `(A0, A1)` int64; `shape`: as they were given."""

    occurrence: int
    table: Tensor | None
    ids: Tensor
    shape: tuple[int, ...]
    padding_idx: int
    module: str


@dataclass
class LossOperation:
    """One loss inside the forward: `targets` int64 of any shape; `ignored`: the id the loss leaves out, None if unknown.

    `logits`: the log-probabilities it was given `(..., V)`; `answers`: the last floating-point results with rows of V numbers before it.
    """

    occurrence: int
    targets: Tensor
    ignored: int | None
    source: str
    answers: tuple[Tensor, ...]
    logits: Tensor


@dataclass
class Observation:
    """What one repeated forward showed. `compared`: (ids, constant) of every `ids == constant`; `added`: shapes (sum, addend).

    `attention`: (module, source) of the first softmax over positions. `layout`: time axis that the model's own layers work along."""

    output: Any = None
    lookups: list[Lookup] = field(default_factory=list)
    losses: list[LossOperation] = field(default_factory=list)
    compared: list[tuple[Tensor, int]] = field(default_factory=list)
    added: list[tuple[tuple[int, ...], tuple[int, ...]]] = field(default_factory=list)
    aranges: list[tuple[int, ...]] = field(default_factory=list)
    attention: tuple[str, str] = ("", "")
    layout: int | None = None


class Rerun:
    """A forward that can be repeated: a module's call, or a function of no arguments. Only the first `rows` of the batch if given.

    `batch_statistics`: an observed repetition took mean and spread over the batch, as a batch-norm written by hand does.

    Every repetition starts from the same random state (torch, Python, numpy) and, where half precision was in use, runs in float32:
    rounding would hide small influences.
    """

    def __init__(self, call: ForwardCall | None = None, function: Callable[[], Any] | None = None) -> None:
        if call is None and function is None:
            raise ValueError("a Rerun needs a module's call or a function; got neither")
        self.call, self.function = call, function
        self.rows: int | None = None
        self.batch_statistics = False
        self._torch_state, self._python_state = torch.get_rng_state(), random.getstate()
        numpy = sys.modules.get("numpy.random")
        self._numpy_state = numpy.get_state() if numpy else None
        self.here = user_line()
        if call is not None:
            self._to_single_precision(call)

    def _to_single_precision(self, call: ForwardCall) -> None:
        call.autocast = None
        module = bare(call.module)
        if any(p.dtype in _HALF for p in module.parameters()):
            module.float()
            call.args = _widened(call.args)
            call.kwargs = _widened(call.kwargs)

    @property
    def arguments(self) -> list[tuple[str, Tensor]]:
        """The tensors handed to the forward, by name (keyword or position)."""
        if self.call is None:
            return []
        return [*tensors_in(self.call.kwargs), *tensors_in(self.call.args)]

    @property
    def module(self) -> nn.Module | None:
        return bare(self.call.module) if self.call else None

    def __call__(self, intercept: Intercept | None = None) -> Any:
        """The forward's output, run again; `intercept` sees every operation and may replace its result."""
        torch.set_rng_state(self._torch_state)
        random.setstate(self._python_state)
        if self._numpy_state is not None:
            sys.modules["numpy.random"].set_state(self._numpy_state)
        if self.call is not None:
            output, _ = rerun(self.call, intercept, keep=False, rows=self.rows)
            return output
        assert self.function is not None
        with ModulePath(nn.Module()) as path, Tracer(path, intercept, keep=False):
            return self.function()

    def source(self, operation_source: str) -> str:
        """The user's line of an operation; for code that lies in a library, the line that called the model."""
        if operation_source and operation_source != self.here:
            return operation_source
        return self.call.source if self.call and self.call.source else operation_source

    def can_slice(self, rows: int) -> bool:
        """True when every tensor argument's leading dimension tells plainly whether it is the batch."""
        if self.call is None:
            return False
        size = batch_size(self.call)
        return size > rows and all(size not in tensor.shape[1:] for _, tensor in self.arguments)


def _widened(value: Any) -> Any:
    return mapped(value, lambda tensor: tensor.float() if tensor.dtype in _HALF else tensor)


def distinct(ids: Tensor) -> Tensor:
    """The different values of `ids`, ascending, `(n,)`."""
    return torch.unique(ids)  # type: ignore[no-any-return]


def is_ids(tensor: Any) -> bool:
    return isinstance(tensor, Tensor) and tensor.dtype in (torch.int64, torch.int32) and tensor.dim() in (1, 2) and tensor.numel() > 1


def lookup_of(operation: Operation) -> tuple[Tensor | None, Tensor, int] | None:
    """(table or None for one-hot, ids as given, padding_idx or -1) if `operation` looks rows up by ids; otherwise None."""
    name, args = operation.name, operation.args
    if name == "embedding" and is_ids(args[1]):
        return args[0], args[1], int(args[2]) if len(args) > 2 else int(operation.kwargs.get("padding_idx", -1))
    if name == "index" and args[0].dim() == 2 and args[0].is_floating_point() and len(args[1]) == 1 and is_ids(args[1][0]):
        return args[0], args[1][0], -1
    if name == "index_select" and args[1] == 0 and args[0].dim() == 2 and args[0].is_floating_point() and is_ids(args[2]):
        return args[0], args[2], -1
    if name in ("scatter", "scatter_") and len(args) == 4 and args[3] == 1 and isinstance(args[2], Tensor) and args[2].shape[-1:] == (1,):
        ids = args[2].squeeze(-1)
        if is_ids(ids) and args[0].dim() == ids.dim() + 1 and args[1] in (-1, ids.dim()):
            return None, ids, -1
    return None


def loss_of(operation: Operation) -> tuple[Tensor, Tensor, int | None] | None:
    """(log-probabilities `(..., V)`, targets, ignored id) if `operation` picks each target's log-probability; otherwise None."""
    name, args = operation.name, operation.args
    if name == "nll_loss_forward":
        return args[0], args[1], int(args[4])
    if name == "nll_loss2d_forward":
        return args[0].movedim(1, -1), args[1], int(args[4])
    if name == "gather" and args[0].is_floating_point() and args[0].requires_grad is not None and args[2].shape[-1:] == (1,):
        last = args[1] in (-1, args[0].dim() - 1)
        return (
            (args[0], args[2].squeeze(-1), None) if last and args[0].shape[:-1] == args[2].shape[:-1] and args[0].dim() in (2, 3) else None
        )
    if (
        name == "index"
        and args[0].is_floating_point()
        and len(args[1]) == args[0].dim()
        and len(args[1]) in (2, 3)
        and all(is_ids(i) for i in args[1])
    ):
        targets = args[1][-1]
        return (args[0], targets, None) if targets.numel() * args[0].shape[-1] == args[0].numel() else None
    return None


def observe(again: Rerun) -> Observation:
    """One repetition, everything about its sequences written down."""
    seen = Observation(layout=layout_of(again.module))
    recent: deque[Tensor] = deque(maxlen=_RECENT)
    means: set[tuple[int, ...]] = set()

    def note(operation: Operation, result: Any) -> Any:
        found = lookup_of(operation) if operation.name in _LOOKUPS else None
        if found is not None:
            table, ids, padding_idx = found
            grid = ids if ids.dim() == 2 else ids.unsqueeze(0)
            seen.lookups.append(
                Lookup(len(seen.lookups), table, grid.detach().long().clone(), tuple(ids.shape), padding_idx, operation.module)
            )
        loss = loss_of(operation) if found is None else None
        if loss is not None and loss[1].numel() > 0:
            classes = loss[0].shape[-1]
            answers = tuple(tensor for tensor in recent if tensor.shape[-1] == classes)
            line = again.source(operation.source)
            seen.losses.append(LossOperation(len(seen.losses), loss[1].detach().clone(), loss[2], line, answers, loss[0].detach()))
        args = operation.args
        if operation.name in _SPREADS or operation.name == "mean":
            again.batch_statistics = again.batch_statistics or (_over_batch(args) and (operation.name != "mean" or args[0].shape in means))
            if operation.name == "mean" and _over_batch(args):
                means.add(tuple(args[0].shape))
        if (
            operation.name in ("eq", "ne")
            and len(args) == 2
            and isinstance(args[0], Tensor)
            and is_ids(args[0])
            and isinstance(args[1], int)
        ):
            seen.compared.append((args[0].detach().clone(), args[1]))
        elif operation.name in ("add", "add_") and len(args) == 2 and isinstance(args[1], Tensor) and isinstance(args[0], Tensor):
            if args[0].shape != args[1].shape and isinstance(result, Tensor) and result.dim() == 3:
                addend = args[1] if args[0].shape == result.shape else args[0]
                seen.added.append((tuple(result.shape), tuple(addend.shape)))
        elif (
            operation.name in SOFTMAX and not seen.attention[1] and (operation.name != "_softmax" or _over_positions(args[0], seen.lookups))
        ):
            seen.attention = operation.module, again.source(operation.source)
        elif operation.name == "arange" and isinstance(result, Tensor):
            seen.aranges.append(tuple(result.shape))
        if isinstance(result, Tensor) and result.dim() in (2, 3) and result.is_floating_point():
            recent.append(result.detach())
        return result

    seen.output = again(note)
    return seen


def _over_positions(scores: Tensor, lookups: list[Lookup]) -> bool:
    """True for a softmax that can weigh positions; one of `(B, T, K)` for ids `(B, T)` gives each token its K classes or experts."""
    sizes = tuple(scores.shape)
    return len(sizes) > 3 or (len(sizes) == 3 and (sizes[1] == sizes[2] or all(found.shape != sizes[:2] for found in lookups)))


def _over_batch(args: tuple[Any, ...]) -> bool:
    """True for a statistic over rows: over the first of two axes, or over the first and every other but one."""
    if len(args) < 2 or not isinstance(args[0], Tensor) or not isinstance(args[1], (list, tuple)):
        return False
    axes = {int(axis) % max(args[0].dim(), 1) for axis in args[1] if isinstance(axis, int)}
    return 0 in axes and args[0].dim() >= 2 and args[0].shape[0] > 1 and len(axes) == args[0].dim() - 1


def is_position_like(ids: Tensor) -> bool:
    """True when ids count up along a row (all rows alike, or restarting at their smallest value), as positions do."""
    if ids.shape[1] < 2:
        return False
    steps = ids[:, 1:] - ids[:, :-1]
    counted = (steps == 1) | (ids[:, 1:] == ids.min()) | (steps == 0)
    return bool(counted.all()) and bool((steps == 1).float().mean() > 0.5)


def token_lookups(seen: Observation) -> list[list[Lookup]]:
    """The look-ups of tokens, those of the same ids together, most various ids first; positions, types and constants left out."""
    groups: list[list[Lookup]] = []
    for lookup in seen.lookups:
        for group in groups:
            if group[0].ids.shape == lookup.ids.shape and torch.equal(group[0].ids, lookup.ids):
                group.append(lookup)
                break
        else:
            groups.append([lookup])
    various = [g for g in groups if (g[0].ids != g[0].ids.flatten()[0]).any()]
    tokens = [g for g in various if not is_position_like(g[0].ids) and not is_position_like(g[0].ids.t())]
    tokens = tokens or [g for g in various if g[0].ids.shape[0] > 1 and not (g[0].ids == g[0].ids[:1]).all()]
    tokens.sort(key=lambda g: -distinct(g[0].ids).numel())
    # Types and segments share the tokens' shape but have few values.
    kept: list[list[Lookup]] = []
    for group in tokens:
        if not any(k[0].ids.shape == group[0].ids.shape and len(distinct(group[0].ids)) <= 4 < len(distinct(k[0].ids)) for k in kept):
            kept.append(group)
    return kept


def time_axis(seen: Observation, shape: tuple[int, ...]) -> int | None:
    """The axis of ids `(A0, A1)` along which positions run, told by position look-ups and position tables added; None if nothing tells."""
    votes = [0, 0]
    for lookup in seen.lookups:
        if tuple(lookup.ids.shape) == shape:
            alike = [bool((lookup.ids == lookup.ids[:1]).all()), bool((lookup.ids == lookup.ids[:, :1]).all())]
            if alike[0] == alike[1]:  # positions that leave padding out (RoBERTa's) differ from row to row
                alike = [is_position_like(lookup.ids), is_position_like(lookup.ids.t())]
            if alike[0] != alike[1]:
                votes[1 if alike[0] else 0] += 1
        elif is_position_like(lookup.ids) and lookup.ids.shape[0] == 1 and shape[0] != shape[1] and lookup.ids.shape[1] in shape:
            votes[shape.index(lookup.ids.shape[1])] += 1
    lengths = {size[0] for size in seen.aranges if size}
    if shape[0] != shape[1] and (shape[0] in lengths) != (shape[1] in lengths):
        votes[0 if shape[0] in lengths else 1] += 1
    for total, addend in seen.added:
        if total[:2] == shape:
            sizes = (1,) * (3 - len(addend)) + addend
            if sizes[0] == 1 != sizes[1]:
                votes[1] += 1
            elif sizes[1] == 1 != sizes[0]:
                votes[0] += 1
    if votes[0] == votes[1]:
        return seen.layout
    return 0 if votes[0] > votes[1] else 1


def layout_of(module: nn.Module | None) -> int | None:
    """1 where all recurrent and attention layers of `module` take the batch first, 0 where all take time first; None if they differ."""
    kinds = (nn.RNNBase, nn.MultiheadAttention)
    layouts = {1 if part.batch_first else 0 for part in module.modules() if isinstance(part, kinds)} if module is not None else set()
    return layouts.pop() if len(layouts) == 1 else None


def float_leaves(output: Any) -> list[Tensor]:
    """The floating-point tensors of an output, in its own order, scalars left out."""
    return [leaf for _, leaf in tensors_in(output) if leaf.is_floating_point() and leaf.dim() > 0]
