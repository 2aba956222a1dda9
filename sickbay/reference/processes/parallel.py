"""The same loop on many processes: the model dealt out to them, and its gradients brought together.

ddp    every process holds the whole model and its own rows; gradients are averaged (Li et al. 2020, arXiv 2006.15704)
fsdp   every process holds a share of each weight, gradient and moment, and gathers a block's weights while it computes
       (Rajbhandari et al. 2020, ZeRO stage 3, arXiv 1910.02054; Zhao et al. 2023, arXiv 2304.11277)
tp     every process holds some heads and hidden units of each block and sees all rows (Shoeybi et al. 2019, arXiv 1909.08053)
"""

from __future__ import annotations

from collections.abc import Iterable
from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh

from sickbay.core.errors import UsageError
from sickbay.reference.models.blocks import Attention, Block
from sickbay.reference.models.encoder_decoder import CrossAttention, CrossBlock
from sickbay.reference.models.kinds import Model
from sickbay.reference.processes.dtensor import gathered, is_dtensor, local
from sickbay.reference.processes.world import World, rows_by_process

NORM_EPS = 1e-6  # as in torch's clip_grad_norm_


def deal_out(model: Model, world: World, device: str = "cpu") -> None:
    """`model`, which every process built alike, is on `device`, as much of it as `world.kind` gives this process.

    "fsdp" and "tp" turn parameters into DTensors: make the optimizer after this.
    Raises UsageError where heads or hidden units cannot be dealt out evenly.
    """
    if world.kind == "fsdp":
        from torch.distributed.fsdp import fully_shard

        mesh = init_device_mesh(torch.device(world.device).type, (world.size,))
        for block in blocks_of(model):
            if isinstance(block, CrossBlock):
                fully_shard(block.cross_attention.key_value, mesh=mesh)  # reads the source before its block is called
            fully_shard(block, mesh=mesh)  # moves a block at a time: the whole model need not fit the device
        fully_shard(model, mesh=mesh)
        return
    model.to(device)
    if world.kind == "tp":
        _split_blocks(model, world)


def blocks_of(model: nn.Module) -> list[Block | CrossBlock]:
    """The blocks of `model`, an encoder-decoder's of both sides."""
    return [module for module in model.modules() if isinstance(module, (Block, CrossBlock))]


def exchanging(model: Model, world: World) -> nn.Module:
    """What to call for logits so that the gradients of all rows reach every process: `model`, under "ddp" inside torch's wrapper."""
    if world.kind != "ddp":
        return model
    from torch.nn.parallel import DistributedDataParallel

    # Processors that send are processors that do not compute: they send everything once, and nothing beside the backward pass.
    once = sum(parameter.numel() * parameter.element_size() for parameter in model.parameters()) / 2**20
    return DistributedDataParallel(
        model, gradient_as_bucket_view=True, bucket_cap_mb=once if torch.device(world.device).type == "cpu" else None
    )


def _split_blocks(model: Model, world: World) -> None:
    """Each process holds its heads' rows of query-key-value, its hidden units' rows of up and gate, and their columns in what follows.

    Of what looks at a source likewise: its heads' rows of query and key-value.
    """
    from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module

    config, size = model.config, world.size
    for field, count in (("num_heads", config.num_heads), ("num_kv_heads", config.kv_heads), ("ffn_dim", config.hidden_dim)):
        if count % size:
            raise UsageError(f"{field} is {count}; with parallel='tp' it must be a multiple of the {size} processes")
    mesh = init_device_mesh(torch.device(world.device).type, (size,))
    plan = {
        "attention.query_key_value": ColwiseParallel(),
        "attention.output": RowwiseParallel(),
        "cross_attention.query": ColwiseParallel(),
        "cross_attention.key_value": ColwiseParallel(),
        "cross_attention.output": RowwiseParallel(),
        "feed_forward.up": ColwiseParallel(),
        "feed_forward.gate": ColwiseParallel(),
        "feed_forward.down": RowwiseParallel(),
    }
    for block in blocks_of(model):
        with torch.no_grad():
            for name, whole in block.named_parameters():
                if (order := rows_by_process(name, config, size)) is not None:
                    whole.copy_(whole[torch.tensor(order)])
        here = {name for name, _ in block.named_modules()}
        parallelize_module(block, mesh, {name: style for name, style in plan.items() if name in here})
        for attention in block.modules():
            if isinstance(attention, (Attention, CrossAttention)):
                attention.num_heads //= size
                attention.kv_heads //= size
            if isinstance(attention, Attention):
                for norm in (attention.query_norm, attention.key_norm):
                    if norm is not None:
                        norm.weight.register_hook(_added_up)


def _added_up(gradient: Tensor) -> Tensor:
    """A weight that all heads share gets the gradients of all heads, not only of those here."""
    gradient = gradient.clone()
    torch.distributed.all_reduce(gradient)
    return gradient


def accumulating(net: nn.Module, last: bool) -> AbstractContextManager[None]:
    """Gradients are exchanged after the last micro-batch of a step only; sharded ones after each, as that is what keeps them small."""
    quiet: AbstractContextManager[None] = net.no_sync() if hasattr(net, "no_sync") and not last else nullcontext()  # type: ignore[operator]
    return quiet


def clip_gradients(parameters: Iterable[Tensor], most: float) -> Tensor:
    """The global L2 norm of the gradients over all processes, which have been scaled down to norm `most` if it was above."""
    parameters = [parameter for parameter in parameters if parameter.grad is not None]
    if not any(is_dtensor(parameter) for parameter in parameters):
        return nn.utils.clip_grad_norm_(parameters, most)
    gradients = [parameter.grad for parameter in parameters if parameter.grad is not None]
    # Norms of what is dealt out and of what each process holds whole cannot be taken in one call.
    dealt, whole = ([gradient for gradient in gradients if is_dtensor(gradient) is kind] for kind in (True, False))
    norms = [nn.utils.get_total_norm(group) for group in (dealt, whole) if group]
    joined = torch.stack([gathered(norm) for norm in norms])
    total: Tensor = torch.linalg.vector_norm(joined)
    scale = (most / (total + NORM_EPS)).clamp(max=1.0)
    for gradient in gradients:
        local(gradient).mul_(scale)
    return total
