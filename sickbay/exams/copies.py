"""Copies, casts and checks inside a forward without which outputs and gradients are the same to the last bit. For use in a forked copy."""

from __future__ import annotations

from collections import Counter
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from sickbay.exams.op_profile import Profile, Timed, total_of
from sickbay.exams.trace import conditions_of
from sickbay.patient import ForwardCall, bare, tensors_in

_LEAST_SHARE = 0.05  # of the forward's seconds
_WIDER = {torch.float32: (torch.float64,), torch.float16: (torch.float32, torch.float64), torch.bfloat16: (torch.float32, torch.float64)}
_READS_OUT = ("_local_scalar_dense", "equal", "is_nonzero")


def examine(call: ForwardCall, profile: Profile) -> list[dict[str, Any]]:
    """Readings of `copy_share`, at most one: share of the forward's seconds, counting what only the script's own checks read."""
    total = profile.seconds
    copies = _round_trips(profile.operations)
    checks = _only_read_out(profile.operations)
    if not total or sum(operation.seconds for operation in (*copies, *checks)) < _LEAST_SHARE * total:
        return []
    if copies and not _same_without(call):
        copies = []
    both = [*copies, *checks]
    seconds: Counter[str] = Counter()
    for operation in both:
        seconds[operation.line] += operation.seconds  # type: ignore[assignment]
    if not both:
        return []
    kinds = Counter("check" if operation in checks else "clone" if operation.name == "clone" else "cast" for operation in both)
    size = sum(tensor.nbytes for operation in copies for _, tensor in tensors_in(operation.result))
    note = {"count": len(both), "bytes": size, "kinds": dict(kinds), "seconds": sum(seconds.values())}
    line = seconds.most_common(1)[0][0]
    where = next(operation.module for operation in both if operation.line == line)
    return [{"signal": "copy_share", "value": sum(seconds.values()) / total, "where": where, "source": line, "note": note}]


def _elidable(name: str, source: Tensor, result: Tensor) -> bool:
    """True for a clone that only makes the same numbers again in the same layout."""
    return name == "clone" and source.stride() == result.stride() and source.dtype == result.dtype and source.device == result.device


def _round_trips(operations: list[Timed]) -> list[Timed]:
    """Clones that change nothing, and casts to a wider type that are cast back before anything else reads them."""
    readers: Counter[int] = Counter()
    for operation in operations:
        if not operation.view:
            readers.update(set(operation.reads))
    found: list[Timed] = []
    widened: dict[int, Timed] = {}
    for operation in operations:
        source = operation.args[0] if operation.args and isinstance(operation.args[0], Tensor) else None
        if source is None or not isinstance(operation.result, Tensor) or not operation.own:
            continue
        if _elidable(operation.name, source, operation.result):
            found.append(operation)
        elif operation.name == "_to_copy" and operation.result.dtype in _WIDER.get(source.dtype, ()) and readers[operation.makes[0]] == 1:
            widened[operation.makes[0]] = operation
        elif operation.name == "_to_copy" and operation.reads and operation.reads[0] in widened:
            first = widened[operation.reads[0]]
            if first.args[0].dtype == operation.result.dtype:
                found += [first, operation]
    return found


def _only_read_out(operations: list[Timed]) -> list[Timed]:
    """Operations whose results go nowhere but into a Python number: checks and prints of every forward."""
    wanted: set[int] = set()
    feeding: dict[int, bool] = {}
    found: list[Timed] = []
    for operation in reversed(operations):
        if operation.name in _READS_OUT:
            if operation.own:
                found.append(operation)
            only = True
        else:
            results = [storage for storage in operation.makes if storage not in operation.reads]
            if operation.view:
                only = all(feeding.get(storage, False) for storage in operation.makes)
                results = []
            else:
                only = bool(results) and all(feeding.get(storage, False) for storage in results)
            if only and not operation.view and operation.own:
                found.append(operation)
        for storage in operation.reads:
            if not operation.view:
                feeding[storage] = only and storage not in wanted
                if not only:
                    wanted.add(storage)
    return found


class Without(TorchDispatchMode):
    """Leaves out clones that change nothing and casts there and back."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._kept: list[Tensor] = []
        self._widened: dict[int, Tensor] = {}

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        return False

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func._schema.name.split("::")[-1]
        if name == "_to_copy" and isinstance(args[0], Tensor):
            original = self._widened.get(int(args[0].untyped_storage()._cdata))
            result = func(*args, **(kwargs or {}))
            if original is not None and original.dtype == result.dtype and original.shape == result.shape:
                return torch.ops.aten.alias(original)
            if result.dtype in _WIDER.get(args[0].dtype, ()):
                self._kept.append(result)
                self._widened[int(result.untyped_storage()._cdata)] = args[0]
            return result
        result = func(*args, **(kwargs or {}))
        if name == "clone" and _elidable(name, args[0], result):
            return torch.ops.aten.alias(args[0])
        return result


def _same_without(call: ForwardCall) -> bool:
    """True if outputs and gradients are bit-identical when the copies are left out."""
    module = bare(call.module)
    answers = []
    for mode in (None, Without()):
        module.zero_grad()
        with conditions_of(call):
            if mode is None:
                output = module(*call.args, **call.kwargs)
            else:
                with mode:
                    output = module(*call.args, **call.kwargs)
            total_of(output).backward()
        tensors = [tensor.detach() for _, tensor in tensors_in(output)]
        answers.append((tensors, [p.grad for p in module.parameters() if p.grad is not None]))
    (first, gradients), (second, others) = answers
    return (
        len(first) == len(second)
        and len(gradients) == len(others)
        and all(a.shape == b.shape and torch.equal(a, b) for a, b in zip((*first, *gradients), (*second, *others)))
    )
