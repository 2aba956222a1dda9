"""Takes a training step's memory apart: measured once in a step that works, worked out without memory for one that did not fit."""

from __future__ import annotations

import contextlib
import dataclasses
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from sickbay.core.record import RecordWriter
from sickbay.exams import fork
from sickbay.exams.asking import Asking
from sickbay.exams.fork import NoAnswer
from sickbay.exams.saved import by_block
from sickbay.patient import ForwardCall, LossCall, Patient, autocast_of, bare, tensors_in

SIGNALS = ("memory_part", "block_activations", "memory_limit")

TIMEOUT = 20.0  # seconds
_AT = 1  # the second step: the optimizer has its state, and a graph that cannot be read has said so
_NO_MEMORY = re.compile(r"out of memory|can't allocate memory|cannot allocate memory", re.IGNORECASE)
_ASKED = re.compile(r"(?:tried to allocate|allocate)\s+([\d.]+)\s*(bytes|KiB|MiB|GiB|TiB)?", re.IGNORECASE)
_UNITS = {"": 1.0, "bytes": 1.0, "kib": 2.0**10, "mib": 2.0**20, "gib": 2.0**30, "tib": 2.0**40}
_ADAM_LIKE = ("Adam", "AdamW", "NAdam", "RAdam", "Adamax", "FusedAdam", "Lamb", "LAMB")
_CGROUP = ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory/memory.limit_in_bytes")
_UNLIMITED = 1 << 60


class MemoryParts:
    """Asks once what fills memory; when memory runs out, what would have."""

    SIGNALS = SIGNALS

    def __init__(self, patient: Patient, record: RecordWriter, asking: Asking) -> None:
        self.patient, self.record, self.asking = patient, record, asking
        self._done = False

    def backward_begin(self, loss: Tensor | None, kind: str) -> None:
        if self._done or kind == "func" or loss is None or loss.grad_fn is None or self.record.step < _AT:
            return
        self._done = True
        root = self.patient.root
        if root is None or torch.cuda.is_initialized():
            return
        call = next(iter(reversed(self.patient.training_calls())), None)
        losses = [one for one in self.patient.losses if one.grad_enabled and not one.spent]
        answer = self.asking.ask(lambda: fork.ask(lambda: _measured(root, loss, losses), TIMEOUT))
        if isinstance(answer, NoAnswer):
            self.record.unobserved("memory_part", answer.reason)
            return
        blocks = answer.pop("blocks")
        parts = {**self._standing(root), **answer}
        self._write(parts, "measured", rows_of(call))
        for name, size in blocks.items():
            self.record.read("block_activations", size, where=name, note={"boundary": answer.get("boundary", 0)})

    def failed(self, exception: Exception) -> None:
        """The script ends for want of memory: what it would have needed, and how much there is."""
        if not isinstance(exception, MemoryError) and not _NO_MEMORY.search(str(exception)):
            return
        root = self.patient.root
        size, what = memory_limit()
        asked = _ASKED.search(str(exception))
        amount = float(asked[1]) * _UNITS[(asked[2] or "bytes").lower()] if asked else 0.0
        call = self.patient.calls[-1] if self.patient.calls else None
        note: dict[str, Any] = {"what": what, "asked": amount, "rows": rows_of(call), "adam": self._like_adam()}
        if root is not None:
            answer = (
                self.asking.ask(lambda: fork.ask(lambda: _imagined(call), TIMEOUT)) if call is not None else NoAnswer("no forward was seen")
            )
            if not isinstance(answer, NoAnswer):
                blocks = answer.pop("blocks")
                self._write({**self._standing(root, expected=True), **answer}, "predicted", rows_of(call))
                note["blocks"] = blocks[:256]
                note["largest"] = max((p.nbytes for p in root.parameters()), default=0)
                note.update({key: answer[key] for key in ("boundary", "outputs", "around")})
            else:
                note["why"] = answer.reason
                self._write(self._standing(root, expected=True), "counted", rows_of(call))
        self.record.read("memory_limit", size, note=note)

    def _write(self, parts: dict[str, float], how: str, rows: int) -> None:
        for name in ("weights", "gradients", "optimizer", "activations", "logits"):
            if name in parts:
                self.record.read("memory_part", parts[name], where=name, note={"how": how, "rows": rows})

    def _standing(self, root: nn.Module, expected: bool = False) -> dict[str, float]:
        """Weights, gradients and optimizer state; `expected`: the state that will be there once the optimizer has stepped."""
        tensors: dict[int, int] = {}
        for tensor in (*root.parameters(), *root.buffers()):
            if tensor.layout == torch.strided:
                tensors[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        gradients = sum(parameter.nbytes for parameter in root.parameters() if parameter.requires_grad)
        state = sum(t.nbytes for optimizer in self.patient.optimizers for kept in optimizer.state.values() for _, t in tensors_in(kept))
        if expected and state < gradients / 2 and self._like_adam():
            state = 2 * gradients
        return {"weights": sum(tensors.values()), "gradients": gradients, "optimizer": state}

    def _like_adam(self) -> bool:
        return any(type(optimizer).__name__ in _ADAM_LIKE for optimizer in self.patient.optimizers)


def _measured(root: nn.Module, loss: Tensor, losses: list[LossCall]) -> dict[str, Any]:
    """Bytes that the graph of `loss` keeps, in all and by block; the logits' own."""
    _refuse_recomputation()
    names = {id(parameter): name for name, parameter in bare(root).named_parameters()}
    sizes = by_block([loss], names)
    logits = max((one.logits.nbytes for one in losses), default=0)
    blocks = {name: size for name, size in sizes.items() if name not in ("", "head")}
    return {"activations": sum(sizes.values()), "logits": logits, "blocks": blocks}


def _refuse_recomputation() -> None:
    """In the copy: reading what a checkpoint keeps must not run the checkpoint's forward."""
    from torch.utils import checkpoint

    def refuse(*_: Any, **__: Any) -> Any:
        raise RuntimeError("not kept: it would be recomputed")

    checkpoint._recomputation_hook = refuse  # type: ignore[assignment,misc]


def _imagined(call: ForwardCall) -> dict[str, Any]:
    """What `call` keeps, worked out without memory, with a cross-entropy over its logits where it makes no loss itself."""
    from sickbay.exams.footprint import imagine_parameters, imagined, kept_by, without_memory

    model = bare(call.module)
    model.train(call.training)
    with without_memory() as mode, autocast_of(call):
        imagine_parameters(mode, model)
        args, kwargs = imagined(mode, call.args), imagined(mode, call.kwargs)

        def forward() -> Any:
            output = model(*args, **kwargs)
            tensors = [tensor for _, tensor in tensors_in(output) if tensor.is_floating_point()]
            scores = max((t for t in tensors if t.dim() >= 2), key=lambda t: t.numel(), default=None)
            if scores is not None and not any(t.dim() == 0 for t in tensors):
                flat = scores.reshape(-1, scores.shape[-1])
                target = torch.zeros(len(flat), dtype=torch.int64, device=flat.device)
                return scores, torch.nn.functional.cross_entropy(flat, target)
            return output

        kept = kept_by(model, forward)
    return {
        "activations": sum(kept.blocks.values()) + kept.around,
        "logits": kept.logits,
        "blocks": list(kept.blocks.values()),
        **{key: value for key, value in dataclasses.asdict(kept).items() if key in ("boundary", "outputs", "around")},
    }


def rows_of(call: ForwardCall | None) -> int:
    """The batch rows of `call`; 0 if they cannot be told."""
    shapes = [tensor.shape for _, tensor in tensors_in((call.args, call.kwargs))] if call is not None else []
    return int(next((shape[0] for shape in shapes if len(shape) > 0), 0))


def memory_limit() -> tuple[float, str]:
    """(bytes, what sets them): the least of GPU, process limit, control group and machine."""
    if torch.cuda.is_initialized():
        return float(torch.cuda.get_device_properties(torch.cuda.current_device()).total_memory), "the GPU's memory"
    return min(_limits(), default=(0.0, ""))


def _limits() -> Iterator[tuple[float, str]]:
    import resource

    for name, text in (("RLIMIT_AS", "the process's address space limit"), ("RLIMIT_DATA", "the process's data limit")):
        soft = resource.getrlimit(getattr(resource, name))[0]
        if 0 < soft < _UNLIMITED:
            yield float(soft), text
    for path in _CGROUP:
        with contextlib.suppress(OSError, ValueError):
            size = int(Path(path).read_text())
            if 0 < size < _UNLIMITED:
                yield float(size), "the control group's limit"
    with contextlib.suppress(OSError, ValueError, IndexError):
        line = next(line for line in Path("/proc/meminfo").read_text().splitlines() if line.startswith("MemTotal"))
        yield float(line.split()[1]) * 1024, "the machine's memory"


def attach(patient: Patient, record: RecordWriter, loop: Any, asking: Asking) -> Callable[[], None]:
    """From now on memory is taken apart when it is due."""
    exam = MemoryParts(patient, record, asking)
    for event in ("backward_begin", "failed"):
        loop.on(event, exam, getattr(exam, event))
    loop.rests(exam)
    return lambda: None
