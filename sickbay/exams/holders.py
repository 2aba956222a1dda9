"""Names what keeps earlier steps' graphs or tensors alive: the variable, the container it grows in, and the line that puts them there."""

from __future__ import annotations

import gc
import sys
from collections import defaultdict
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from sickbay.core.record import RecordWriter
from sickbay.exams import fork
from sickbay.exams.asking import Asking
from sickbay.exams.fork import NoAnswer
from sickbay.exams.reach import Container, Found, Path, Reach, text_of
from sickbay.exams.saved import saved_bytes
from sickbay.exams.storing_lines import drops_elements, storing_line
from sickbay.patient import GRAPH_MARK, Patient, user_line

SIGNALS = ("memory_holder",)

TIMEOUT = 20.0  # seconds
_NODES = 400_000  # of all graphs together
_NODES_OF_ONE = 40_000
_WORTH = 0.8  # share of the kept steps that a holder must account for
_WAIT = 6  # steps between the two looks at what grows
_FEWEST = 4  # tensors that a container must have gained, at one in two steps at least
_SEARCHES = 3
_OTHERS = 3


class Holders:
    """Asks who holds what, when the retention probe says that graphs are kept or that memory grows."""

    SIGNALS = SIGNALS

    def __init__(self, patient: Patient, record: RecordWriter, loop: Any, asking: Asking) -> None:
        self.patient, self.record, self.loop, self.asking = patient, record, loop, asking
        self._searches = 0
        self._before: dict[str, list[int]] | None = None
        self._look_again = -1
        self._growth = 0.0

    def graphs_kept(self, marks: list[Any]) -> None:
        """Graphs of many earlier steps are alive."""
        if self._searches >= _SEARCHES:
            return
        self._searches += 1
        frame, line = sys._getframe(1), user_line(3)
        answer = self._ask(lambda: holder_of_graphs(frame, marks, self.patient))
        if isinstance(answer, NoAnswer) or answer is None:
            return
        self.record.read("memory_holder", answer["count"], note={"line_of_step": line, **answer}, source=answer.pop("source", "") or line)

    def memory_grows(self, per_step: float) -> None:
        """Memory grows steadily: which containers do?"""
        if self._look_again >= 0 or self._searches >= _SEARCHES or (self._searches and not self.asking.affordable()):
            return
        frame = sys._getframe(1)
        answer = self._ask(lambda: census(frame))
        if not isinstance(answer, NoAnswer):
            self._before, self._look_again, self._growth = answer, self.record.step + _WAIT, per_step
            self.loop.on("round_end", self, self.round_end)

    def round_end(self, step: int) -> None:
        if self._before is None or step < self._look_again:
            return
        frame, before = sys._getframe(1), self._before
        self._before, self._look_again = None, -1
        self.loop.off("round_end", self)
        self._searches += 1
        line = user_line(3)
        answer = self._ask(lambda: grown(frame, before, _WAIT))
        if not isinstance(answer, NoAnswer) and answer is not None:
            note = {"kind": "tensors", "line_of_step": line, "growth": self._growth, **answer}
            self.record.read("memory_holder", answer["count"], note=note, source=answer.pop("source", "") or line)

    def _ask(self, question: Callable[[], Any]) -> Any:
        """In a copy of the process where there can be one; where CUDA forbids it, here, since it only looks."""
        if torch.cuda.is_initialized():
            return self.asking.ask(question)
        return self.asking.ask(lambda: fork.ask(question, TIMEOUT))


def holder_of_graphs(frame: Any, marks: list[Any], patient: Patient) -> dict[str, Any] | None:
    """Which variable keeps the graphs of `marks` (weak references) alive; None if only cycles do, which Python clears itself."""
    gradients = [
        (f"{name}.grad", parameter.grad)
        for root in patient.roots
        for name, parameter in root.named_parameters()
        if parameter.grad is not None and parameter.grad.grad_fn is not None
    ]
    reach = Reach(frame, [("gradients", dict(gradients))] if gradients else ())
    steps: dict[Path, set[int]] = defaultdict(set)
    held: dict[Path, list[Found]] = defaultdict(list)
    nodes = 0
    for found in reach.found:
        if found.tensor.grad_fn is None or nodes > _NODES:
            continue
        reached, visited = marked_steps(found.tensor)
        nodes += visited
        old = reached & {mark.step for mark in (ref() for ref in marks) if mark is not None}
        for length in range(1, len(found.path) + 1):
            steps[found.path[:length]] |= old
            if old:
                held[found.path[:length]].append(found)
    best = max((len(kept) for kept in steps.values()), default=0)
    kept_steps = {mark.step for mark in (ref() for ref in marks) if mark is not None}
    if best < max(1, _WORTH * len(kept_steps)):
        del reach
        gc.collect()
        kept_steps = {mark.step for mark in (ref() for ref in marks) if mark is not None}
        if not kept_steps:
            return None
        return {"kind": "graph", "count": len(kept_steps), "path": "", "bytes": 0, "freed": None}
    full = [path for path, kept in steps.items() if len(kept) >= _WORTH * best]
    full = [path for path in full if not any(other[: len(path)] == path and other != path for other in full)]
    path = min(full, key=lambda one: (len(held[one]) == 1, len(one)))
    return _describe(path, held[path], reach.containers.get(path), len(steps[path]), [other for other in full if other != path])


def _describe(path: Path, held: list[Found], container: Container | None, count: int, others: list[Path]) -> dict[str, Any]:
    oldest = held[0]
    size, freed = saved_bytes([oldest.tensor], _NODES_OF_ONE)
    own = sum({f.tensor.untyped_storage().data_ptr(): f.tensor.untyped_storage().nbytes() for f in held if _stored(f.tensor)}.values())
    chain = container is None
    per_step = (own / max(count, 1)) + (size / max(count, 1) if chain else size)
    return {
        "kind": "graph",
        "count": count,
        "path": text_of(path),
        "type": "tensor" if chain else container.kind if container else "",
        "chain": chain,
        "drops": drops_elements(path, oldest.file),
        "bounded": container is not None and container.bounded,
        "function": oldest.function,
        "tensors": len(held),
        "bytes": per_step,
        "freed": freed,
        "shape": list(oldest.tensor.shape),
        "others": [text_of(other) for other in others[:_OTHERS]],
        "source": storing_line(path, oldest.file, oldest.function),
    }


def _stored(tensor: Tensor) -> bool:
    return tensor.layout == torch.strided and tensor.device.type != "meta"


def marked_steps(tensor: Tensor) -> tuple[set[int], int]:
    """The steps whose marks lie in `tensor`'s graph, and how many nodes were looked at."""
    steps: set[int] = set()
    stack: list[Any] = [tensor.grad_fn]
    seen = set(stack)
    while stack and len(seen) < _NODES_OF_ONE:
        node = stack.pop()
        mark = node.metadata.get(GRAPH_MARK)
        if mark is not None:
            steps.add(mark.step)
        for following, _ in node.next_functions:
            if following is not None and following not in seen:
                seen.add(following)
                stack.append(following)
    return steps, len(seen)


def census(frame: Any) -> dict[str, list[int]]:
    """By container's path: how many tensors lie in it, and their bytes."""
    return {text_of(path): [len(sizes), sum(sizes.values())] for path, sizes in _contents(Reach(frame)).items()}


def grown(frame: Any, before: dict[str, list[int]], steps: int) -> dict[str, Any] | None:
    """The container without bound that gained most bytes since the `census` that gave `before`; None if there is none."""
    reach = Reach(frame)
    gains: list[tuple[int, int, Path]] = []
    for path, sizes in _contents(reach).items():
        count, size = before.get(text_of(path), [0, 0])
        if len(sizes) - count >= max(_FEWEST, steps // 2) and text_of(path) in before:
            gains.append((sum(sizes.values()) - size, len(sizes) - count, path))
    best = max((size for size, _, _ in gains), default=0)
    counts = {path: count for size, count, path in gains if size >= _WORTH * best}
    if not counts:
        return None
    whole = _innermost(list(counts))[0]
    count = counts[whole]
    innermost = _innermost([path for _, _, path in gains if path[: len(whole)] == whole])
    path = innermost[0]
    if any(reach.containers[path[:n]].bounded for n in range(1, len(path) + 1) if path[:n] in reach.containers):
        return None
    inside = [f for f in reach.found if any(f.path[: len(one)] == one for one in innermost)]
    if all(isinstance(f.tensor, torch.nn.Parameter) for f in inside):
        return None
    container = reach.containers.get(path)
    return {
        "count": count,
        "path": text_of(path),
        "type": container.kind if container else "",
        "others": len(innermost) - 1,
        "graphs": sum(f.tensor.grad_fn is not None for f in inside),
        "function": inside[0].function,
        "tensors": len(inside),
        "bytes": best / steps,
        "steps": steps,
        "shape": list(inside[-1].tensor.shape),
        "drops": drops_elements(path, inside[0].file),
        "whole": inside[-1].tensor.is_floating_point(),
        "source": storing_line(path, inside[0].file, inside[0].function),
    }


def _innermost(paths: list[Path]) -> list[Path]:
    """Those of `paths` that no other of them lies beneath."""
    return [path for path in paths if not any(other != path and other[: len(path)] == path for other in paths)]


def _contents(reach: Reach) -> dict[Path, dict[int, int]]:
    """By container: the bytes of each storage in it."""
    held: dict[Path, dict[int, int]] = defaultdict(dict)
    for found in reach.found:
        if not _stored(found.tensor):
            continue
        storage = found.tensor.untyped_storage()
        for length in range(1, len(found.path)):
            if found.path[:length] in reach.containers:
                held[found.path[:length]][storage.data_ptr()] = storage.nbytes()
    return held


def attach(patient: Patient, record: RecordWriter, loop: Any, asking: Asking) -> Callable[[], None]:
    """From now on whatever is kept has its holder named."""
    exam = Holders(patient, record, loop, asking)
    for event in ("graphs_kept", "memory_grows"):
        loop.on(event, exam, getattr(exam, event))
    return lambda: None
