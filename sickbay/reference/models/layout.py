"""How weights lie in memory when a model only writes: each token reads every matrix once, and that reading is most of its work.

Both ways replace layers of `model`, for processors alone; a model to be trained further is loaded anew.
"""

from __future__ import annotations

from typing import TypeVar

import torch
from torch import Tensor, nn

Part = TypeVar("Part", bound=nn.Module)

LARGEST_HALF = torch.finfo(torch.float16).max
STRIP = 16  # outputs: of 8, 16 and 32 the one that is never far from the fastest, for one row and for eight
LEAST_IN_STRIPS = 2**18  # weights, 1 MiB: smaller matrices stay in a core's cache from token to token and gain nothing
PACKERS = {"fbgemm", "x86"}  # the libraries within torch that multiply float32 by packed float16


class StripLinear(nn.Module):
    """`linear` with its weights in strips of STRIP outputs, input by input; the products are those of `linear` but for rounding.

    For a few rows the processor's libraries read such strips, shared out to all cores, faster than the whole matrix, and for many
    rows a little slower (GPT-2's head on two cores: 3.4 ms instead of 11.2 for one row, 9 instead of 23 for 8, a quarter slower for
    256 in the layers). A head that shares its weights with the embedding holds them a second time.
    """

    strips: Tensor  # (strips, in, STRIP)

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        self._out = linear.out_features
        weight = nn.functional.pad(linear.weight.detach(), (0, 0, 0, -linear.out_features % STRIP))
        self.register_buffer("strips", weight.unflatten(0, (-1, STRIP)).transpose(1, 2).contiguous())
        self.bias = linear.bias

    def forward(self, x: Tensor) -> Tensor:
        strips, width, _ = self.strips.shape
        out = torch.bmm(x.reshape(1, -1, width).expand(strips, -1, width), self.strips)
        out = out.transpose(0, 1).reshape(*x.shape[:-1], strips * STRIP)[..., : self._out]
        return out if self.bias is None else out + self.bias


@torch.no_grad()
def lay_out_for_reading(model: nn.Module) -> None:
    """Every linear layer of `model` that a core's cache does not hold is a StripLinear; float32 on the processor alone.

    Dropout, which does nothing to a model that writes, is gone: in a small model calling it takes a twentieth of a token's time.
    """
    for parent, attribute, _ in _parts(model, nn.Dropout):
        setattr(parent, attribute, nn.Identity())
    for parent, attribute, linear in _parts(model, nn.Linear):
        weight = linear.weight
        if weight.device.type == "cpu" and weight.dtype == torch.float32 and weight.numel() >= LEAST_IN_STRIPS:
            setattr(parent, attribute, StripLinear(linear))


class HalfLinear(nn.Module):
    """`linear` with its weights rounded to float16, half the memory to read; the sums and all else stay float32."""

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        self._packed = torch.ops.quantized.linear_prepack_fp16(linear.weight.detach().contiguous(), linear.bias)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = torch.ops.quantized.linear_dynamic_fp16(x, self._packed)
        return out


@torch.no_grad()
def halve_weights(model: nn.Module) -> None:
    """Every linear layer of `model` is a HalfLinear. Raises ValueError where torch cannot, or a weight is beyond float16."""
    if not PACKERS & set(torch.backends.quantized.supported_engines):
        raise ValueError(
            f"weights in fp16 need torch's {' or '.join(sorted(PACKERS))} library, which this processor's torch lacks; use fp32"
        )
    for parent, attribute, linear in _parts(model, nn.Linear):
        if linear.weight.device.type != "cpu":
            raise ValueError(f"weights in fp16 are for the processor; the model is on {linear.weight.device}: use fp32")
        if not bool(linear.weight.abs().amax() <= LARGEST_HALF):
            name = next(name for name, module in model.named_modules() if module is linear)
            raise ValueError(f"weights in fp16 end at {LARGEST_HALF:.0f}, and {name} holds larger ones; use fp32")
        setattr(parent, attribute, HalfLinear(linear))


def _parts(model: nn.Module, kind: type[Part]) -> list[tuple[nn.Module, str, Part]]:
    """(the module that holds it, under which name, the part) of every part of that kind."""
    return [(parent, name, part) for parent in model.modules() for name, part in parent.named_children() if isinstance(part, kind)]
