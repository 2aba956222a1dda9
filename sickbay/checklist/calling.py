"""How one batch becomes a loss: the calling convention of the user's model and loss function."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn

from sickbay.checklist.target import Target, tensors
from sickbay.patient import mapped, tensors_in

Convention = Literal["own", "model, batch", "batch", "outputs, targets"]
_MODEL_NAMES = ("model", "net", "module", "network")
_TARGET_NAMES = ("labels", "targets", "target", "label", "y")
IGNORED = -100  # torch's default ignore_index


class CallError(Exception):
    """The batch could not be turned into a loss by this convention."""


@dataclass
class Calling:
    """Turns a batch into a scalar loss. `conventions`: those that are possible, the likeliest first; the first one that works stays."""

    loss: Callable[..., Any] | None
    conventions: tuple[Convention, ...]

    @classmethod
    def of(cls, target: Target) -> Calling:
        return cls(target.loss, _possible(target.loss))

    def __call__(self, model: nn.Module, batch: Any) -> Tensor:
        """The scalar loss with its graph. What the user's code raises passes through, from the likeliest convention."""
        device = next(model.parameters()).device
        batch = mapped(batch, lambda tensor: tensor.to(device))
        first: Exception | None = None
        for convention in self.conventions:
            try:
                loss = self._by(convention, model, batch)
            except Exception as problem:
                first = first or problem
                continue
            self.conventions = (convention,)
            return loss
        assert first is not None
        raise first

    def _by(self, convention: Convention, model: nn.Module, batch: Any) -> Tensor:
        if convention == "model, batch":
            assert self.loss is not None
            return scalar(self.loss(model, batch), "the loss function")
        if convention == "batch":
            assert self.loss is not None
            return scalar(self.loss(batch), "the loss function")
        if convention == "own":
            return own_loss(call(model, batch))
        assert self.loss is not None
        inputs, targets = divided(batch)
        output = call(model, inputs)
        return scalar(self.loss(output, targets), "the loss function")


def _possible(loss: Callable[..., Any] | None) -> tuple[Convention, ...]:
    if loss is None:
        return ("own",)
    if isinstance(loss, nn.Module):
        return ("outputs, targets",)
    try:
        parameters = [p for p in inspect.signature(loss).parameters.values() if p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD)]
    except (TypeError, ValueError):
        return ("outputs, targets", "model, batch")
    needed = [p for p in parameters if p.default is p.empty]
    first = parameters[0] if parameters else None
    if first is not None and (
        first.name in _MODEL_NAMES or (isinstance(first.annotation, type) and issubclass(first.annotation, nn.Module))
    ):
        return ("model, batch",)
    if len(needed) == 1 and len(parameters) == 1:
        return ("batch",)
    if len(parameters) > 1 and parameters[1].name == "batch":
        return ("model, batch", "outputs, targets")
    return ("outputs, targets", "model, batch")


def call(model: nn.Module, inputs: Any) -> Any:
    """The model's output: a mapping is given by name, a tuple or list by position, anything else as it is."""
    if isinstance(inputs, Mapping):
        return model(**inputs)
    if isinstance(inputs, (tuple, list)):
        return model(*inputs)
    return model(inputs)


def divided(batch: Any) -> tuple[Any, Any]:
    """Inputs and targets of a batch: the last of a tuple, `labels` (targets, y ...) of a mapping. Raises CallError for anything else."""
    if isinstance(batch, Mapping):
        name = next((name for name in _TARGET_NAMES if name in batch), None)
        if name is None:
            raise CallError(
                f"the batch has {', '.join(map(str, batch))} and none of {', '.join(_TARGET_NAMES)}: write a loss(model, batch)"
            )
        return {key: value for key, value in batch.items() if key != name}, batch[name]
    if isinstance(batch, (tuple, list)) and len(batch) >= 2:
        inputs = batch[0] if len(batch) == 2 else tuple(batch[:-1])
        return inputs, batch[-1]
    kind = f"one tensor {tuple(batch.shape)}" if isinstance(batch, Tensor) else f"a {type(batch).__name__}"
    raise CallError(f"a batch is {kind}, not (inputs, targets): write a loss(model, batch) that takes it whole")


def own_loss(output: Any) -> Tensor:
    """The loss that the model's output holds: its `.loss`, or the one scalar in it. Raises CallError if there is none."""
    named = output.get("loss") if isinstance(output, Mapping) else getattr(output, "loss", None)
    if isinstance(named, Tensor):
        return scalar(named, "the model's loss")
    scalars = [tensor for _, tensor in tensors_in(output) if tensor.numel() == 1 and tensor.is_floating_point()]
    if len(scalars) != 1:
        raise CallError(
            f"no loss function was given and the model's output holds {len(scalars) or 'no'} scalars: "
            "give a loss, or let the batch hold labels"
        )
    return scalars[0].reshape(())


def scalar(value: Any, what: str) -> Tensor:
    """The scalar in what a loss function returned: itself, or the first of a tuple or mapping. Raises CallError if it is none."""
    if isinstance(value, Mapping):
        value = value.get("loss", next(iter(value.values()), None))
    elif isinstance(value, (tuple, list)) and value:
        value = value[0]
    if not isinstance(value, Tensor):
        raise CallError(f"{what} gave a {type(value).__name__}: it must be a scalar tensor")
    if value.numel() != 1:
        raise CallError(f"{what} has shape {tuple(value.shape)}: it must be a scalar (a mean over the batch)")
    return value.reshape(())


def outputs_of(model: nn.Module, calling: Calling, batch: Any) -> tuple[Tensor, list[Tensor]]:
    """The loss, and the floating-point tensors that the model gave for `batch`, detached."""
    seen: list[Tensor] = []
    hook = model.register_forward_hook(lambda *event: seen.extend(t.detach() for _, t in tensors_in(event[2]) if t.is_floating_point()))
    try:
        return calling(model, batch), seen
    finally:
        hook.remove()


def rows_of(batch: Any) -> int:
    """Examples in a batch: the first axis that most of its tensors share; 0 if they have none."""
    sizes = [tensor.shape[0] for tensor in tensors(batch) if tensor.dim()]
    return max(set(sizes), key=sizes.count) if sizes else 0


def first_rows(batch: Any, rows: int) -> Any:
    """The first `rows` examples of a batch; tensors without that axis stay whole."""
    size = rows_of(batch)
    return mapped(batch, lambda tensor: tensor[:rows] if tensor.dim() and tensor.shape[0] == size else tensor)


def repeated(batch: Any, rows: int) -> Any:
    """A batch of `rows` examples, those of `batch` over and over."""
    size = rows_of(batch)

    def grown(tensor: Tensor) -> Tensor:
        if not tensor.dim() or tensor.shape[0] != size:
            return tensor
        return tensor[torch.arange(rows) % size]

    return mapped(batch, grown)


def ids_and_targets(batch: Any) -> tuple[Tensor, Tensor] | None:
    """Token ids `(B, T)` and the target of each position `(B, T)`, ignored ones -100; None where the batch is not such a one.

    Labels that are the ids themselves are taken to be shifted by the model, as transformers' causal models do.
    """
    try:
        inputs, targets = divided(batch)
    except CallError:
        return None
    found = [t for t in tensors(inputs) if t.dtype == torch.int64 and t.dim() == 2]
    if not found or not isinstance(targets, Tensor) or targets.dtype != torch.int64 or targets.shape != found[0].shape:
        return None
    ids = found[0]
    counted = targets != IGNORED
    if bool(counted.any()) and bool((targets[counted] == ids[counted]).all()):
        shifted = torch.full_like(targets, IGNORED)
        shifted[:, :-1] = targets[:, 1:]
        return ids, shifted
    return ids, targets
