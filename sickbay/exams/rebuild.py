"""Compute a step's loss again from the model's new output, so that its backward pass can be watched."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from sickbay.exams.origin import OriginWatch
from sickbay.patient import LossCall, Patient, tensors_in


def rebuilt_loss(patient: Patient, output: Any, watch: OriginWatch) -> tuple[Tensor, Tensor, str]:
    """(tensor, cotangent, how): what to differentiate and from which gradient on, scaled as the run scales its loss.

    The root's own loss if it returns one; the captured loss call on the new logits; otherwise the mean of the output.
    Raises RuntimeError when nothing in the output requires a gradient.
    """
    outputs = [tensor for _, tensor in tensors_in(output) if tensor.is_floating_point() and tensor.requires_grad]
    if not outputs:
        raise RuntimeError("nothing in the model's output requires a gradient")
    scalars = [tensor for tensor in outputs if tensor.dim() == 0]
    if scalars:
        return scalars[0], torch.full_like(scalars[0], patient.scale), "its own loss was differentiated"
    for call in reversed(patient.losses):
        if call.grad_enabled:
            for logits in (shaped for tensor in outputs for shaped in as_logits(tensor, call.logits)):
                watch.source = call.source
                with watch:
                    value = again(call, logits)
                watch.source = ""
                if value is not None:
                    return value, torch.full_like(value, patient.scale), f"{call.name} was computed again on the same targets"
    largest = max(outputs, key=Tensor.numel)
    return largest, torch.full_like(largest, 1.0 / largest.numel()), "the mean of the output stood in for the loss"


def as_logits(output: Tensor, logits: Tensor) -> Iterator[Tensor]:
    """`output` in each of the usual forms in which a loss takes it that has the shape and the values of `logits`.

    Of a loss whose backward has run only the shape is left to go by.
    """
    forms: list[Callable[[], Tensor]] = [lambda: output, lambda: output.reshape(logits.shape)]
    if output.dim() >= 3:
        forms += [
            lambda: output[:, :-1].reshape(logits.shape),
            lambda: output.transpose(1, 2),
            lambda: output[:, :-1].transpose(1, 2),
            lambda: output[:, -1],
        ]
    for form in forms:
        try:
            shaped = form()
        except (RuntimeError, IndexError):
            continue
        if shaped.shape == logits.shape and (logits.is_meta or _alike(shaped, logits)):
            yield shaped.to(logits.dtype)


def _alike(one: Tensor, other: Tensor) -> bool:
    return torch.allclose(one.detach().float(), other.detach().float(), rtol=1e-3, atol=1e-5, equal_nan=True)


def again(call: LossCall, logits: Tensor) -> Tensor | None:
    """The captured loss on new `logits`, reduced to a scalar; None if torch has no such function."""
    function = getattr(F, call.name, None)
    if function is None:
        return None
    extra: dict[str, Any] = {"reduction": call.reduction}
    if call.classifies:
        extra["ignore_index"] = call.ignore_index
    if call.name == "cross_entropy":
        extra["label_smoothing"] = call.smoothing
    value: Tensor = function(logits, call.targets, **extra)
    return value if value.dim() == 0 else value.mean()
