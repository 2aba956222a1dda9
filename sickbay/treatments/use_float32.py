"""The model computes in float32, where the processor's widest instructions and its memory bandwidth count twice.

Advice: leave torch.set_default_dtype alone, cast the data once (`.astype("float32")`, `.float()`), and call `model.float()` before the
optimizer is made. What needs double precision (a sum over millions, a solver) can have it for itself.
"""

from __future__ import annotations

from sickbay.core.treatment import Treatment

treatment = Treatment(
    id="use-float32", safety="advice", summary="Train in float32: model.float() before the optimizer is made, data cast once."
)
