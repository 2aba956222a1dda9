"""Sees what outlives its step: autograd graphs and model outputs of earlier steps that are still in memory, and the memory in use.

A graph is marked with an object of ours in its node's metadata, which dies with the node; an output by a weak reference to its storage.
Nothing is kept alive by either.
"""

from __future__ import annotations

import math
import statistics
import weakref
from collections import deque
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef

from sickbay.core.record import RecordWriter
from sickbay.patient import GRAPH_MARK, ForwardCall, Patient, tensors_in
from sickbay.probes.heap import Heap
from sickbay.probes.loop import Loop

SIGNALS = ("kept_graphs", "kept_outputs", "resident_memory")
FEEDS = ("memory_holder",)  # of the exam that asks who holds what

DUE = 10  # earlier steps whose graphs are all alive: nothing that a loop needs reaches back so far
_REMEMBERED = 256
_RECENT = 2  # steps: the variables of the loop still hold the last step's loss until they are assigned anew
_FIRST_READINGS = 4
_OUTPUTS = 3  # tensors of one output that are followed
_DEEP_EVERY = 2  # steps between marks at a graph's beginning, which whatever is kept of its middle keeps as well
_HOPS = 1000
_WINDOW = 5  # steps whose median memory is one point of the trend
_SETTLED = 16  # first steps: optimizer state, the allocator's arenas and our own tables are still being made
_GROWTH = 5 << 20  # bytes over three windows that are worth a look
_USED = 0.3  # of that growth the allocator must have given out: the rest may be fragments
_EVEN = 0.3  # a leak's growth is steady: the smaller of two increments is at least this share of the larger


class Mark:
    """Alive exactly as long as the graph of one forward or loss of `step`."""

    __slots__ = ("__weakref__", "step")

    def __init__(self, step: int) -> None:
        self.step = step


class Retention:
    """Writes how many earlier steps' graphs and how many bytes of their outputs are alive; says when that, or memory, grows steadily."""

    SIGNALS = SIGNALS

    def __init__(self, patient: Patient, record: RecordWriter, loop: Loop) -> None:
        self.patient, self.record, self.loop = patient, record, loop
        self._marks: deque[weakref.ref[Mark]] = deque(maxlen=_REMEMBERED)
        self._outputs: deque[tuple[int, int, StorageWeakRef]] = deque(maxlen=_REMEMBERED)
        self._resident: deque[tuple[int, int]] = deque(maxlen=3 * _WINDOW)
        self._heap = Heap()
        self._in_use: deque[int | None] = deque(maxlen=3)  # bytes at the end of each window
        self._rounds = 0
        self._looked = 0
        self._told_graphs = 0
        self._last = -1
        self._page = 0
        self._statm: Any = None

    def forward_end(self, call: ForwardCall, output: Any) -> None:
        if not call.grad_enabled:
            return
        mark, first = Mark(self.record.step), None
        for number, (_, tensor) in enumerate(tensors_in(output)):
            if number >= _OUTPUTS:
                break
            if tensor.grad_fn is not None and not torch._C._functorch.is_functorch_wrapped_tensor(tensor):
                self._mark(tensor.grad_fn, mark)
                if first is None:
                    first = tensor.grad_fn
                if tensor.layout == torch.strided and tensor.device.type != "meta":
                    self._outputs.append((self.record.step, tensor.nbytes, StorageWeakRef(tensor.untyped_storage())))

        if first is not None and self._rounds % _DEEP_EVERY == 0:
            self._mark(_beginning(first), mark)

    def backward_begin(self, loss: Tensor | None, kind: str) -> None:
        if kind != "func" and loss is not None and loss.grad_fn is not None:
            self._mark(loss.grad_fn, Mark(self.record.step))

    def _mark(self, node: Any, mark: Mark) -> None:
        if GRAPH_MARK not in node.metadata:
            node.metadata[GRAPH_MARK] = mark
            self._marks.append(weakref.ref(mark))

    def round_end(self, step: int) -> None:
        self._rounds = step + 1
        marks = self.alive(step)
        kept = len({mark.step for mark in marks})
        if kept != self._last or self._rounds <= _FIRST_READINGS:
            self._last = kept
            self.record.read("kept_graphs", kept)
        if kept >= max(DUE, 4 * self._told_graphs) and self._unbroken(marks, step):
            self._told_graphs = kept
            self.loop.emit("graphs_kept", [weakref.ref(mark) for mark in marks])
        if not self.loop.pace.resting:
            self._watch_memory(step)

    def alive(self, step: int) -> list[Mark]:
        """The marks of graphs that are older than the step before `step` and still there; the dead are forgotten."""
        if not self._marks:
            return []
        marks = [mark for mark in (ref() for ref in self._marks) if mark is not None]
        self._marks = deque((weakref.ref(mark) for mark in marks), maxlen=_REMEMBERED)
        return [mark for mark in marks if mark.step <= step - _RECENT]

    @staticmethod
    def _unbroken(marks: list[Mark], step: int) -> bool:
        """True if what is alive reaches up to now without a gap: a single old graph kept on purpose is none."""
        steps = sorted({mark.step for mark in marks})
        newest = steps[-DUE:]
        return newest[-1] >= step - 2 * _RECENT - 1 and newest[-1] - newest[0] <= 2 * DUE

    def kept_outputs(self, step: int) -> tuple[int, int]:
        """(steps, bytes) of model outputs of earlier steps whose memory is still in use."""
        self._outputs = deque((entry for entry in self._outputs if not entry[2].expired()), maxlen=_REMEMBERED)
        old = [(made, size) for made, size, _ in self._outputs if made <= step - _RECENT]
        return len({made for made, _ in old}), sum(size for _, size in old)

    def _watch_memory(self, step: int) -> None:
        resident = self._resident_bytes()
        if not resident:
            return
        self.record.read("resident_memory", resident)
        if self._rounds <= _SETTLED:
            return
        self._resident.append((self._rounds, resident))
        self._looked += 1
        if self._looked % _WINDOW:
            return
        self._in_use.append(None if torch.cuda.is_initialized() else self._heap.bytes_in_use(resident))
        if len(self._resident) == 3 * _WINDOW:
            values = [size for _, size in self._resident]
            rounds = self._resident[-1][0] - self._resident[0][0] + 1
            first, second, third = (statistics.median(values[i : i + _WINDOW]) for i in range(0, 3 * _WINDOW, _WINDOW))
            smaller, larger = sorted((second - first, third - second))
            if smaller >= _EVEN * larger and third - first >= _GROWTH and self._given_out() >= _USED * (third - first):
                steps, size = self.kept_outputs(step)
                self.record.read("kept_outputs", size, note={"steps": steps})
                self.loop.emit("memory_grows", 1.5 * (third - first) / rounds)

    def _given_out(self) -> float:
        """Bytes that the allocator gave out over the last two windows and that are in use; infinite where it cannot tell."""
        first, last = self._in_use[0], self._in_use[-1]
        return math.inf if first is None or last is None else last - first

    def _resident_bytes(self) -> int:
        """Bytes of the device's allocator where there is one in use, else of the process; 0 where neither can be told."""
        if torch.cuda.is_initialized():
            return int(torch.cuda.memory_allocated())
        if self._statm is None:
            import resource

            self._page = resource.getpagesize()
            self._statm = open("/proc/self/statm", "rb", buffering=0)  # noqa: SIM115  (closed by `close`)
        self._statm.seek(0)
        return int(self._statm.read(128).split()[1]) * self._page

    def close(self) -> None:
        if self._statm is not None:
            self._statm.close()


def _beginning(node: Any) -> Any:
    """The node that `node`'s graph begins with, always along the oldest operand: in a residual network two hops a block."""
    for _ in range(_HOPS):
        following = [one for one, _ in node.next_functions if one is not None and one.next_functions]
        if not following:
            break
        node = following[0] if len(following) == 1 else min(following, key=lambda one: int(one._sequence_nr()))
    return node


def attach(patient: Patient, record: RecordWriter, loop: Loop) -> Callable[[], None]:
    """From now on graphs and outputs are marked, and what outlives its step is counted."""
    probe = Retention(patient, record, loop)
    for event in ("forward_end", "backward_begin", "round_end"):
        loop.on(event, probe, getattr(probe, event))
    loop.rests(probe)
    return probe.close
