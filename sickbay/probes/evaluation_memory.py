"""Sees graphs that no backward ever uses, and the outputs that an evaluation piles up."""

from __future__ import annotations

import gc
import weakref
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.multiprocessing.reductions import StorageWeakRef

from sickbay.core.record import RecordWriter
from sickbay.patient import ForwardCall, Patient, tensors_in
from sickbay.probes.loop import Loop

SIGNALS = ("evaluation_graphs", "evaluation_outputs")

_KEY = "sickbay-forward"
_FEWEST = 4  # forwards without a backward: two or three belong to losses that compare outputs
_EVALUATIONS = 2  # older ones with graphs alive: one may be the best so far
_MOST = 512
_NODES = 100_000
_WORTH = 8 << 20  # bytes of outputs below which it does not matter that they are kept
_OUTPUTS = 3
_MANY = 256 << 20  # bytes of outputs from which on it is worth a look (some hundredths of a second) whether copies of them are kept


class _Forward:
    __slots__ = ("__weakref__", "bytes", "source", "training")

    def __init__(self, training: bool, source: str) -> None:
        self.training, self.source, self.bytes = training, source, 0


class EvaluationMemory:
    """Writes how many forwards in a row built a graph for nothing, and how many bytes of an evaluation's outputs are alive at once."""

    SIGNALS = SIGNALS

    def __init__(self, patient: Patient, record: RecordWriter, loop: Loop) -> None:
        self.patient, self.record, self.loop = patient, record, loop
        self._pending: list[tuple[weakref.ref[_Forward], bool, str, int]] = []
        self._kept: dict[bool, int] = {True: 0, False: 0}
        self._stayed: list[tuple[weakref.ref[_Forward], int, str, int]] = []  # of short evaluations; the number is the step
        self._outputs: list[tuple[int, StorageWeakRef]] = []
        self._given_out = 0
        self._form: tuple[int, int, torch.dtype] = (0, 0, torch.float32)
        self._rows: list[int] = []  # of the outputs so far, added up
        self._evaluated = 0
        self._line = ""
        self._trained: weakref.WeakSet[nn.Module] = weakref.WeakSet()

    def forward_end(self, call: ForwardCall, output: Any) -> None:
        if call.grad_enabled:
            self._evaluation_over()
            if not self.loop.glances_at(call):
                self._build(call, output)
        elif call.module in self._trained:
            self._evaluate(call, _tensors(output))

    def _build(self, call: ForwardCall, output: Any) -> None:
        tensors = [t for t in _tensors(output) if t.grad_fn is not None and not torch._C._functorch.is_functorch_wrapped_tensor(t)]
        if not tensors or len(self._pending) >= _MOST:
            return
        forward = _Forward(call.training, call.source)
        for tensor in tensors:
            node: Any = tensor.grad_fn
            node.metadata[_KEY] = forward
        size = sum(tensor.nbytes for tensor in tensors)
        self._pending.append((weakref.ref(forward), call.training, call.source, size))
        if len(self._pending) >= _FEWEST:
            alive = sum(ref() is not None for ref, training, _, _ in self._pending[-4 * _FEWEST :] if training == call.training)
            self._kept[call.training] = max(self._kept[call.training], alive)

    def _evaluate(self, call: ForwardCall, tensors: list[Tensor]) -> None:
        given = {
            tensor.untyped_storage().data_ptr() for _, tensor in tensors_in((call.args, call.kwargs)) if tensor.layout == torch.strided
        }
        for tensor in tensors:
            if tensor.layout == torch.strided and tensor.device.type != "meta" and tensor.untyped_storage().data_ptr() not in given:
                self._outputs.append((tensor.nbytes, StorageWeakRef(tensor.untyped_storage())))
        self._evaluated += 1
        self._line = call.source
        largest = max(tensors, key=lambda tensor: tensor.nbytes, default=None)
        if largest is not None and largest.dim() > 1:
            self._given_out += largest.nbytes
            self._form = _form(largest)
            self._rows.append(len(largest) + (self._rows[-1] if self._rows else 0))
        if self._evaluated >= _FEWEST and self._evaluated & (self._evaluated - 1) == 0:
            self._weigh()

    def _weigh(self) -> None:
        self._outputs = [(size, ref) for size, ref in self._outputs if not ref.expired()]
        alive = sum(size for size, _ in self._outputs)
        if len(self._outputs) < self._evaluated // 2:
            alive = self._joined() if self._given_out >= _MANY else 0
        if alive >= _WORTH:
            self.record.read("evaluation_outputs", alive, note={"forwards": self._evaluated}, source=self._line)

    def _joined(self) -> int:
        """Bytes of the largest tensor whose rows are as many as those of the first outputs together: they were copied into one."""
        joined = set(self._rows[1:])
        return max(
            (t.nbytes for t in gc.get_objects() if type(t) is Tensor and t.dim() > 1 and _form(t) == self._form and len(t) in joined),
            default=0,
        )

    def _evaluation_over(self) -> None:
        if not self._evaluated:
            return
        if self._evaluated >= _FEWEST:
            self._weigh()
        self._evaluated = self._given_out = 0
        self._outputs.clear()
        self._rows.clear()

    def backward_begin(self, loss: Tensor | None, kind: str) -> None:
        self._evaluation_over()
        if not self.loop.pace.resting:
            for call in self.patient.training_calls():
                self._trained.add(call.module)
        if not self._pending:
            return
        evaluated = any(not training for _, training, *_ in self._pending)
        if (evaluated or len(self._pending) > _FEWEST) and loss is not None and kind != "func":
            reached = _reached(loss)
            vain = [entry for entry in self._pending if not (forward := entry[0]()) or forward not in reached]
            self._in_vain(vain)
            self._outlive(vain)
        self._pending.clear()
        self._kept = {True: 0, False: 0}

    def _outlive(self, vain: list[tuple[weakref.ref[_Forward], bool, str, int]]) -> None:
        """Evaluations of one or two forwards show what they keep by the graphs of earlier ones that are still alive."""
        self._stayed = [entry for entry in self._stayed if entry[0]() is not None][-_MOST:]
        if len({step for _, step, *_ in self._stayed}) >= _EVALUATIONS and len(self._stayed) >= _FEWEST:
            note = {"kept": len(self._stayed), "bytes": max(size for *_, size in self._stayed), "mode": "evaluation"}
            self.record.read("evaluation_graphs", len(self._stayed), note=note, source=self._stayed[0][2])
            self._stayed.clear()
        self._stayed += [(forward, self.record.step, source, size) for forward, training, source, size in vain if not training]

    def finish(self) -> None:
        """What ends with the run was an evaluation, if it was in evaluation mode."""
        self._evaluation_over()
        vain = [entry for entry in self._pending if not entry[1]]
        self._in_vain(vain)
        self._outlive(vain)
        self._pending.clear()

    def _in_vain(self, entries: list[tuple[weakref.ref[_Forward], bool, str, int]]) -> None:
        for training in (False, True):
            mine = [entry for entry in entries if entry[1] == training]
            if len(mine) >= _FEWEST and len(self._trained):
                kept = min(self._kept[training], len(mine))
                note = {"kept": kept, "bytes": max(entry[3] for entry in mine), "mode": "training" if training else "evaluation"}
                self.record.read("evaluation_graphs", len(mine), note=note, source=mine[0][2])


def _tensors(output: Any) -> list[Tensor]:
    return [tensor for _, tensor in tensors_in(output)][:_OUTPUTS]


def _form(tensor: Tensor) -> tuple[int, int, torch.dtype]:
    """What outputs keep when they are padded to one length and joined: number of dimensions, classes, type."""
    return tensor.dim(), tensor.shape[-1], tensor.dtype


def _reached(loss: Tensor) -> set[_Forward]:
    """The forwards whose outputs `loss` is made of."""
    found: set[_Forward] = set()
    stack: list[Any] = [loss.grad_fn] if loss.grad_fn is not None else []
    seen = set(stack)
    while stack and len(seen) < _NODES:
        node = stack.pop()
        forward = node.metadata.get(_KEY)
        if forward is not None:
            found.add(forward)
        for following, _ in node.next_functions:
            if following is not None and following not in seen:
                seen.add(following)
                stack.append(following)
    return found


def attach(patient: Patient, record: RecordWriter, loop: Loop) -> Callable[[], None]:
    """From now on what evaluations keep is counted."""
    probe = EvaluationMemory(patient, record, loop)
    for event in ("forward_end", "backward_begin", "finish"):
        loop.on(event, probe, getattr(probe, event))
    loop.sleeps(probe)
    return lambda: None
