"""The same loop on many processes: what differs between one process and many is asked of a World.

ddp    every process holds the whole model and its own rows; gradients are averaged (Li et al. 2020, arXiv 2006.15704)
fsdp   every process holds a share of each weight, gradient and moment, and gathers a block's weights while it computes
       (Rajbhandari et al. 2020, ZeRO stage 3, arXiv 1910.02054; Zhao et al. 2023, arXiv 2304.11277)
tp     every process holds some heads and hidden units of each block and sees all rows (Shoeybi et al. 2019, arXiv 1909.08053)
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn

from sickbay.core.errors import UsageError
from sickbay.reference.blocks import Attention
from sickbay.reference.config import Config
from sickbay.reference.dtensor import is_dtensor, local
from sickbay.reference.loss import IGNORED
from sickbay.reference.model import Transformer

Kind = Literal["none", "ddp", "fsdp", "tp"]
NORM_EPS = 1e-6  # as in torch's clip_grad_norm_


@dataclass(frozen=True)
class World:
    """The processes that train one model together. `rank`: this one's number, from 0 to `size` - 1."""

    rank: int = 0
    size: int = 1
    kind: Kind = "none"
    device: str = "cpu"

    @property
    def first(self) -> bool:
        """Whether this process is the one that prints and writes what is written once."""
        return self.rank == 0

    @property
    def shards(self) -> int:
        """Parts that a batch's rows are dealt to; under "tp" every process sees all rows."""
        return 1 if self.kind == "tp" else self.size

    @property
    def shard(self) -> int:
        """The part that this process sees."""
        return self.rank % self.shards

    def rows(self, ids_BT: Tensor, targets_BT: Tensor) -> tuple[Tensor, Tensor]:
        """This process's rows of a batch; where there are fewer rows than parts, the last row with no target that counts."""
        if self.shards == 1:
            return ids_BT, targets_BT
        if self.shard >= len(ids_BT):
            return ids_BT[-1:], torch.full_like(targets_BT[-1:], IGNORED)
        return ids_BT[self.shard :: self.shards], targets_BT[self.shard :: self.shards]

    def sum(self, *numbers: float) -> list[float]:
        """Each number added up over the parts of the batch, in float64."""
        if self.shards == 1:
            return list(numbers)
        totals = torch.tensor(numbers, dtype=torch.float64)  # on the CPU: the GPU need not be waited for
        torch.distributed.all_reduce(totals)
        return totals.tolist()

    def most(self, number: int) -> int:
        """The highest that any process gave."""
        if self.size == 1:
            return number
        highest = torch.tensor(number)
        torch.distributed.all_reduce(highest, op=torch.distributed.ReduceOp.MAX)
        return int(highest)

    def row_order(self, name: str, config: Config) -> list[int] | None:
        """The rows of the whole tensor `name` in the order in which the processes hold them; None = from the first to the last."""
        split = self.kind == "tp" and "attention.query_key_value." in name
        return _rows_by_process(config, self.size) if split else None


ALONE = World()


@contextmanager
def together(kind: Kind, device: str = "cpu") -> Iterator[World]:
    """The World that torchrun started this process in. Raises UsageError where `kind` and the way of starting do not belong together."""
    size = int(os.environ.get("WORLD_SIZE", "1"))
    if kind == "none":
        if size > 1:
            raise UsageError(f"{size} processes were started, yet parallel is 'none': each would train for itself; choose ddp, fsdp or tp")
        yield World(device=device)
        return
    if "RANK" not in os.environ:
        raise UsageError(f"parallel is {kind!r}, which torchrun must start: torchrun --nproc-per-node 2 -m sickbay train ...")
    if device == "cuda":
        device = f"cuda:{os.environ['LOCAL_RANK']}"
        torch.cuda.set_device(device)
    # Counts and flags travel between CPUs, so that no step waits for the GPU to tell them.
    torch.distributed.init_process_group("cpu:gloo,cuda:nccl" if device.startswith("cuda") else "gloo")
    try:
        yield World(int(os.environ["RANK"]), size, kind, device)
    finally:
        torch.distributed.destroy_process_group()


def spread(model: Transformer, world: World) -> nn.Module:
    """What to call for logits: `model`, which every process built alike, dealt out as `world.kind` says. Make the optimizer after this.

    "fsdp" and "tp" turn its parameters into DTensors. Raises UsageError where heads or hidden units cannot be dealt out evenly.
    """
    if world.kind == "ddp":
        from torch.nn.parallel import DistributedDataParallel

        return DistributedDataParallel(model, gradient_as_bucket_view=True)
    if world.kind == "fsdp":
        from torch.distributed.fsdp import fully_shard

        mesh = torch.distributed.init_device_mesh(torch.device(world.device).type, (world.size,))
        for block in model.blocks:
            fully_shard(block, mesh=mesh)
        fully_shard(model, mesh=mesh)
    if world.kind == "tp":
        _split_blocks(model, world)
    return model


def _split_blocks(model: Transformer, world: World) -> None:
    """Each process holds its heads' rows of query-key-value, its hidden units' rows of up and gate, and their columns in what follows."""
    from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module

    config, size = model.config, world.size
    for field, count in (("num_heads", config.num_heads), ("num_kv_heads", config.kv_heads), ("ffn_dim", config.hidden_dim)):
        if count % size:
            raise UsageError(f"{field} is {count}; with parallel='tp' it must be a multiple of the {size} processes")
    mesh = torch.distributed.init_device_mesh(torch.device(world.device).type, (size,))
    plan = {
        "attention.query_key_value": ColwiseParallel(),
        "attention.output": RowwiseParallel(),
        "feed_forward.up": ColwiseParallel(),
        "feed_forward.gate": ColwiseParallel(),
        "feed_forward.down": RowwiseParallel(),
    }
    order = torch.tensor(_rows_by_process(config, size))
    for block in model.blocks:
        attention = block.attention
        assert isinstance(attention, Attention)
        with torch.no_grad():
            for whole in attention.query_key_value.parameters():
                whole.copy_(whole[order])
        parts = plan if config.activation == "swiglu" else {name: style for name, style in plan.items() if name != "feed_forward.gate"}
        parallelize_module(block, mesh, parts)
        attention.num_heads //= size
        attention.kv_heads //= size
        for norm in (attention.query_norm, attention.key_norm):
            if norm is not None:
                norm.weight.register_hook(_added_up)


def _added_up(gradient: Tensor) -> Tensor:
    """A weight that all heads share gets the gradients of all heads, not only of those here."""
    gradient = gradient.clone()
    torch.distributed.all_reduce(gradient)
    return gradient


def _rows_by_process(config: Config, size: int) -> list[int]:
    """Rows of the joined query-key-value matrix, those of process 0's heads first."""
    width = config.head_dim
    kinds, begin = [], 0
    for heads in (config.num_heads, config.kv_heads, config.kv_heads):
        kinds.append(range(begin * width, (begin + heads) * width))
        begin += heads
    return [row for rank in range(size) for rows in kinds for row in rows[rank * len(rows) // size : (rank + 1) * len(rows) // size]]


def accumulating(net: nn.Module, last: bool) -> AbstractContextManager[None]:
    """Gradients are exchanged after the last micro-batch of a step only; sharded ones after each, as that is what keeps them small."""
    from torch.nn.parallel import DistributedDataParallel

    if isinstance(net, DistributedDataParallel) and not last:
        quiet: AbstractContextManager[None] = net.no_sync()
        return quiet
    return nullcontext()


def clip_gradients(parameters: Iterable[Tensor], most: float) -> Tensor:
    """The global L2 norm of the gradients over all processes, which have been scaled down to norm `most` if it was above."""
    parameters = [parameter for parameter in parameters if parameter.grad is not None]
    if not any(is_dtensor(parameter) for parameter in parameters):
        return nn.utils.clip_grad_norm_(parameters, most)
    gradients = [parameter.grad for parameter in parameters if parameter.grad is not None]
    # Norms of what is dealt out and of what each process holds whole cannot be taken in one call.
    dealt, whole = ([gradient for gradient in gradients if is_dtensor(gradient) is kind] for kind in (True, False))
    norms: list[Any] = [nn.utils.get_total_norm(group) for group in (dealt, whole) if group]
    joined = torch.stack([norm.full_tensor() if is_dtensor(norm) else norm for norm in norms])
    total = torch.linalg.vector_norm(joined)
    scale = (most / (total + NORM_EPS)).clamp(max=1.0)
    for gradient in gradients:
        local(gradient).mul_(scale)
    return total
