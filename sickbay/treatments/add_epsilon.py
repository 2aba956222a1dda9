"""The denominator cannot be zero.

Counts: `total / count.clamp(min=1)`. Norms and variances: `x / (norm + 1e-6)`, `(variance + 1e-5).rsqrt()`, in float16 an eps of at
least 6e-8. A mean over a selection that may be empty: leave the term out when `mask.sum() == 0`. Replace the denominator itself;
`torch.where` around the quotient leaves the gradient NaN.
"""

from __future__ import annotations

from sickbay.core.treatment import Treatment

treatment = Treatment(
    id="add-epsilon",
    safety="advice",
    summary="Keep the denominator away from zero: clamp counts to 1, add an eps to norms and variances.",
)
