"""The processes that train one model together: which this one is, which rows are its own, and what they tell each other."""

from __future__ import annotations

import os
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch

from sickbay.core.errors import UsageError
from sickbay.reference.models.config import Config
from sickbay.reference.settings.recipe import Parallel


@dataclass(frozen=True)
class World:
    """The processes that train one model together. `rank`: this one's number, from 0 to `size` - 1."""

    rank: int = 0
    size: int = 1
    kind: Parallel = "none"
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

    @property
    def rows(self) -> slice:
        """This process's rows of a batch, as batches.py takes them."""
        return slice(self.shard, None, self.shards)

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

    @contextmanager
    def first_alone(self) -> Iterator[None]:
        """The first process has done what is inside before the others begin it."""
        if not self.first:
            self.most(0)
        yield
        if self.first:
            self.most(0)

    def row_order(self, name: str, config: Config) -> list[int] | None:
        """The rows of the whole tensor `name` in the order in which the processes hold them; None = from the first to the last."""
        return rows_by_process(name, config, self.size) if self.kind == "tp" else None


ALONE = World()


@contextmanager
def together(kind: Parallel, device: str = "cpu", rows: int = 0) -> Iterator[World]:
    """The World that torchrun started this process in, to which batches of `rows` rows are dealt.

    Raises UsageError where `kind`, the way of starting and the number of rows do not belong together.
    """
    size = int(os.environ.get("WORLD_SIZE", "1"))
    if kind == "none":
        if size > 1:
            raise UsageError(f"{size} processes were started, yet parallel is 'none': each would train for itself; choose ddp, fsdp or tp")
        yield World(device=device)
        return
    if "RANK" not in os.environ:
        raise UsageError(f"parallel is {kind!r}, which torchrun must start: torchrun --nproc-per-node 2 -m sickbay train ...")
    if kind != "tp" and rows % size:
        raise UsageError(
            f"batch_size is {rows}; with parallel={kind!r} it must be a multiple of the {size} processes, which share its rows"
        )
    if device == "cuda":
        device = f"cuda:{os.environ['LOCAL_RANK']}"
        torch.cuda.set_device(device)
    # Counts and flags travel between CPUs, so that no step waits for the GPU to tell them.
    torch.distributed.init_process_group("cpu:gloo,cuda:nccl" if device.startswith("cuda") else "gloo")
    try:
        yield World(int(os.environ["RANK"]), size, kind, device)
    finally:
        torch.distributed.destroy_process_group()
        # DDP and FSDP keep gloo's threads alive beyond this. A thread that lets go of the work it did last (which holds
        # Python objects of the backward) once the interpreter is closing down aborts the process, so it may do that now.
        time.sleep(0.2)


def rows_by_process(name: str, config: Config, size: int) -> list[int] | None:
    """Rows of the tensor `name`, process 0's heads first, where several matrices of heads lie in it; None = from the first to the last."""
    if "attention.query_key_value." in name:
        stacked = [config.num_heads, config.kv_heads, config.kv_heads]
    elif "attention.key_value." in name:
        stacked = [config.kv_heads, config.kv_heads]
    else:
        return None
    width = config.head_dim
    kinds, begin = [], 0
    for heads in stacked:
        kinds.append(range(begin * width, (begin + heads) * width))
        begin += heads
    return [row for rank in range(size) for rows in kinds for row in rows[rank * len(rows) // size : (rank + 1) * len(rows) // size]]
