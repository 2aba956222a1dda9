"""What one rank of several trains on and with: marks of its batches and weights, for the reader to lay beside those of the other ranks.

No collective is added to the run. Which steps are marked depends on their number alone, so that all ranks mark the same ones.
"""

from __future__ import annotations

import sys
import weakref
import zlib
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed import distributed_c10d
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data.distributed import DistributedSampler

from sickbay.core.record import RecordWriter
from sickbay.patient import Patient, bare, tensors_in
from sickbay.probes.gradients import named_parameters
from sickbay.probes.loop import Loop
from sickbay.probes.unseen import unseen

SIGNALS = ("rank_weights", "rank_batch")

_ALL_UNTIL, _EIGHTH_UNTIL, _RARE = 64, 512, 64  # steps: all are marked, then every eighth, then every 64th
_TENSORS = 128  # whose norms are kept, evenly spread over the model
_SAMPLE = 512  # elements of each tensor that make a batch's mark
_ON_DEVICE = 16  # steps in which a batch that lies on a GPU is marked as well
_LEARNING = 4  # steps in which the script's own collectives are looked at
_SHARDED = ("FullyShardedDataParallel", "FSDP", "FlatParameter", "DTensor")
_EXCHANGES = ("all_to_all", "all_to_all_single")


class Replicas:
    """Marks the first batch of a step and the weights that its forward used, where the script's process group has several ranks."""

    SIGNALS = SIGNALS

    def __init__(self, patient: Patient, record: RecordWriter, loop: Loop) -> None:
        self.patient, self.record, self.loop = patient, record, loop
        self.wrapped: weakref.WeakKeyDictionary[nn.Module, tuple[bool, frozenset[str]]] = weakref.WeakKeyDictionary()
        self.samplers = 0
        self._synced: set[str] = set()
        self._sums = False
        self._backward_is_over = False
        self._averages_weights = False
        self._exchanges = False
        self._pointers: set[int] = set()
        self._step = -1
        self._model: weakref.ref[nn.Module] | None = None
        self._weights: list[float] = []
        self._gradients: list[float] = []
        self._around = ""

    # --- events ---------------------------------------------------------------------------------------------------
    def backward_begin(self, loss: Tensor | None, kind: str) -> None:
        step = self.record.step
        if step == self._step or not _marked(step) or not _several():
            return
        calls = [call for call in self.patient.training_calls() if not call.spent]
        if not calls or _is_sharded(calls[0].module):
            return
        self._step, self._gradients = step, []
        self._model = weakref.ref(calls[0].module)
        targets = [known.targets for known in self.patient.losses if known.grad_enabled and not known.spent]
        batch = _mark([*tensors_in((calls[0].args, calls[0].kwargs)), *(("", tensor) for tensor in targets)], step)
        if batch:
            self.record.read("rank_batch", batch, source=calls[0].source)
        self._weights = _norms([parameter.detach() for _, parameter in self._parameters()])

    def forward_begin(self, call: Any) -> None:
        self._backward_is_over = False

    def backward_end(self, loss: Tensor | None, kind: str) -> None:
        self._backward_is_over = True

    def step_begin(self, optimizer: Any, late: bool) -> None:
        self._backward_is_over = False
        if self._step == self.record.step and not self._gradients:
            self._gradients = _norms([torch.zeros(()) if p.grad is None else p.grad.detach() for _, p in self._parameters()])

    def round_end(self, step: int) -> None:
        if self._step != step or not self._weights:
            return
        model, parameters = self._model() if self._model is not None else None, self._parameters()
        if model is not None and parameters:
            names = [name for name, _ in parameters]
            chosen = range(0, len(names), -(-len(names) // _TENSORS))
            by, apart = self._replicated_by(model, names)
            note: dict[str, Any] = {
                "by": by,
                "around": self._around,
                "apart": [place for place, index in enumerate(chosen) if names[index] in apart],
                "layout": zlib.crc32(repr([(name, tuple(p.shape)) for name, p in parameters]).encode()),
                "norms": [self._weights[index] for index in chosen],
                "gradients": sum(self._gradients),
                "averaged": self._averages_weights,
            }
            if step < _LEARNING:
                note["names"] = [names[index] for index in chosen]
            self.record.read("rank_weights", sum(self._weights), where=type(bare(model)).__name__, note=note)
        self._weights, self._gradients = [], []

    # --- what shows that the ranks are to be replicas ---------------------------------------------------------------
    def _replicated_by(self, model: nn.Module, names: list[str]) -> tuple[str, set[str]]:
        """(what makes the ranks replicas of one model, "" if nothing was seen; names of the parameters that it leaves out)."""
        self._around = ""
        for wrapper, (whole, ignored) in tuple(self.wrapped.items()):
            inside = bare(wrapper)
            if whole and (inside is bare(model) or any(part is bare(model) for part in inside.modules())):
                # The wrapper synchronises only what its own forward started.
                self._around = "" if model is wrapper else type(wrapper).__name__
                return "DistributedDataParallel", {name for name in names if name in ignored}
        if len(self._synced & set(names)) >= len(names) / 2:
            return "all_reduce of the gradients", set(names) if self._exchanges else set(names) - self._synced
        if self._sums:  # in one piece, some may be missing: which ones is seen in whether they stay equal
            return "all_reduce of the gradients", set(names)
        return ("DistributedSampler", set()) if self.samplers else ("", set())

    def collective(self, name: str, tensor: Any) -> None:
        """The script calls a collective on `tensor`: which gradients or weights does it hold?"""
        self._exchanges = self._exchanges or name in _EXCHANGES
        if not isinstance(tensor, Tensor) or not tensor.is_floating_point():
            return
        if self.record.step >= _LEARNING:
            self._averages_weights = self._averages_weights or tensor.data_ptr() in self._pointers
            return
        everything = [pair for root in tuple(self.patient.roots) for pair in named_parameters(root) if pair[1].requires_grad]
        self._pointers.update(parameter.data_ptr() for _, parameter in everything)
        if tensor.data_ptr() in self._pointers:
            self._averages_weights = self._averages_weights or self.record.step > 0
            return
        made = [(name, p.grad) for name, p in everything if p.grad is not None]
        found = [name for name, gradient in made if gradient.data_ptr() == tensor.data_ptr()]
        whole = sum(gradient.numel() for _, gradient in made)
        if not found and len(made) > 1 and tensor.numel() == whole:
            found = [name for name, _ in made]
        self._sums = self._sums or (self._backward_is_over and len(made) > 1 and tensor.numel() > whole / 2)
        self._synced.update(found)

    def _parameters(self) -> list[tuple[str, nn.Parameter]]:
        model = self._model() if self._model is not None else None
        return [] if model is None else [(name, p) for name, p in named_parameters(bare(model)) if p.requires_grad and p.numel()]

    # --- what is put around torch's own ------------------------------------------------------------------------------
    def listen(self) -> None:
        """Batches and weights are marked from now on: there is a process group."""
        for event in ("forward_begin", "backward_begin", "backward_end", "step_begin", "round_end"):
            self.loop.on(event, self, getattr(self, event))

    def around_start(self, original: Any) -> Any:
        @unseen
        def init_process_group(*args: Any, **kwargs: Any) -> Any:
            result = original(*args, **kwargs)
            if self.loop.awake():
                with self.loop.sheltered("process_group", self):
                    self.listen()
            return result

        return init_process_group

    def around_wrapper(self, original: Any) -> Any:
        @unseen
        def __init__(wrapper: Any, *args: Any, **kwargs: Any) -> None:
            original(wrapper, *args, **kwargs)
            if self.loop.awake():
                with self.loop.sheltered("wrapper", self):
                    whole = dist.get_world_size(wrapper.process_group) == dist.get_world_size()
                    ignored = frozenset(str(name).removeprefix("module.") for name in wrapper.parameters_to_ignore)
                    self.wrapped[wrapper] = (whole, ignored)

        return __init__

    def around_sampler(self, original: Any) -> Any:
        @unseen
        def __init__(sampler: Any, *args: Any, **kwargs: Any) -> None:
            original(sampler, *args, **kwargs)
            if self.loop.awake():
                with self.loop.sheltered("sampler", self):
                    self.samplers += int(_several() and sampler.num_replicas == dist.get_world_size())

        return __init__

    def around_collective(self, name: str) -> Callable[[Any], Any]:
        def around(original: Any) -> Any:
            @unseen
            def collective(*args: Any, **kwargs: Any) -> Any:
                if self.loop.awake():
                    with self.loop.sheltered("collective", self):
                        self.collective(name, args[0] if args else kwargs.get("tensor"))
                return original(*args, **kwargs)

            return collective

        return around


def _several() -> bool:
    """True in a process group of more than one rank."""
    return dist.is_initialized() and dist.get_world_size() > 1


def _marked(step: int) -> bool:
    return step < _ALL_UNTIL or (step < _EIGHTH_UNTIL and step % 8 == 0) or step % _RARE == 0


def _is_sharded(model: nn.Module) -> bool:
    """True where each rank holds a part of the tensors: they differ by design."""
    kinds = [type(part).__name__ for part in model.modules()] + [type(parameter).__name__ for parameter in model.parameters()]
    return any(kind.startswith(_SHARDED) for kind in kinds)


def _norms(tensors: list[Tensor]) -> list[float]:
    """The sum of absolute values of each tensor: one pass and one transfer for each device and dtype."""
    groups: dict[Any, list[int]] = {}
    for index, tensor in enumerate(tensors):
        groups.setdefault((tensor.device, tensor.dtype, tensor.layout), []).append(index)
    found = [0.0] * len(tensors)
    for (_, dtype, layout), members in groups.items():
        if layout is torch.strided and dtype.is_floating_point:
            sums = torch.stack(torch._foreach_norm([tensors[index] for index in members], 1)).tolist()
            for index, value in zip(members, sums, strict=True):
                found[index] = value
    return found


def _mark(tensors: list[tuple[str, Tensor]], step: int) -> int:
    """A checksum of a batch: all its tensors, by their beginnings and sizes; 0 = nothing to mark, or nothing varied in it."""
    mark, varied = 0, False
    for _, tensor in tensors[:8]:
        if tensor.numel() < 2 or tensor.requires_grad or tensor.is_sparse or (tensor.device.type != "cpu" and step >= _ON_DEVICE):
            continue
        sample = tensor.detach().reshape(-1)[:_SAMPLE].contiguous().cpu()
        varied = varied or bool((sample != sample[0]).any())
        mark = zlib.crc32(sample.view(torch.uint8).numpy().tobytes(), mark + tensor.numel())
    return mark if varied else 0


def attach(patient: Patient, record: RecordWriter, loop: Loop) -> Callable[[], None]:
    """From now on batches and weights are marked wherever several ranks train; a run of one process pays nothing."""
    if "torch.distributed" not in sys.modules or not dist.is_available():
        return lambda: None
    probe = Replicas(patient, record, loop)
    if dist.is_initialized():
        probe.listen()
    for module in (dist, distributed_c10d):
        loop.replace(module, "init_process_group", probe.around_start)
    loop.replace(DistributedDataParallel, "__init__", probe.around_wrapper)
    loop.replace(DistributedSampler, "__init__", probe.around_sampler)
    for name in ("all_reduce", *_EXCHANGES):
        for module in (dist, distributed_c10d):
            loop.replace(module, name, probe.around_collective(name))
    return lambda: None
