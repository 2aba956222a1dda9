"""Half precision has the range of float32.

`torch.autocast(device_type, dtype=torch.bfloat16)` without a GradScaler. bfloat16 has 8 bits of precision instead of 11, so keep the
weights themselves in float32. Where the hardware has float16 only, leave the named operation out of autocast:
`with torch.autocast(device_type, enabled=False): y = f(x.float())`. On a CPU without bfloat16 instructions it is slow.
"""

from __future__ import annotations

from sickbay.core.treatment import Treatment

treatment = Treatment(
    id="use-bfloat16",
    safety="advice",
    summary="Train in bfloat16, which has float32's range and needs no loss scale; or run the overflowing operation in float32.",
)
