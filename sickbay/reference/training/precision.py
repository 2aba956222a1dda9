"""Half precision: products in 16 bits, weights and sums in float32 (Micikevicius et al. 2018)."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext

import torch

from sickbay.reference.settings.recipe import Precision

TYPES = {"bf16": torch.bfloat16, "fp16": torch.float16}
WIDE = 256  # of a model: from here on a CPU's bf16 products save more than the conversions around them cost (bench/trainer.py)


def settled(precision: Precision, dim: int, device: str) -> Precision:
    """`precision`, or what "auto" stands for here with a model `dim` wide: bf16 where that is faster than fp32."""
    if precision != "auto":
        return precision
    kind = torch.device(device).type
    if kind == "cuda":
        return "bf16" if torch.cuda.is_bf16_supported(including_emulation=False) else "fp32"
    return "bf16" if kind == "cpu" and dim >= WIDE and slow_here("bf16", device) is None else "fp32"


def autocast(precision: Precision, device: str) -> AbstractContextManager[object]:
    """Inside it, torch computes products in `precision`, which is settled, and what loses by it in float32."""
    if precision == "fp32":
        return nullcontext()
    return torch.autocast(torch.device(device).type, dtype=TYPES[precision])


def make_scaler(precision: Precision, device: str) -> torch.amp.GradScaler:
    """Lifts fp16's gradients out of its narrow range and skips steps in which they overflowed; passes through otherwise."""
    return torch.amp.GradScaler(torch.device(device).type, enabled=precision == "fp16")


def slow_here(precision: Precision, device: str) -> str | None:
    """Why `precision` makes training slower on this machine, None where it does not."""
    if precision in ("auto", "fp32") or torch.device(device).type != "cpu":
        return None
    if precision == "bf16":
        supported = torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()
    else:
        supported = bool(getattr(torch.cpu, "_is_amx_fp16_supported", bool)())
    # 13 times: nanoGPT's CPU recipe under bf16 autocast on an AMD EPYC without avx512_bf16.
    return None if supported else f"this CPU has no {precision} instructions: expect a run many times slower (13 measured) than fp32"
