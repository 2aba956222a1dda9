"""One call on a tensor with one more axis does the work of a Python loop's many calls.

Advice: keep the positions (or rows) as an axis and let matmul, softmax and torch.nn.functional.scaled_dot_product_attention (with
is_causal or a mask) run over it; write (a[..., None] * b).sum(...) as a @ b or torch.einsum.
"""

from __future__ import annotations

from sickbay.core.treatment import Treatment

treatment = Treatment(
    id="batch-the-loop",
    safety="advice",
    summary="Do the loop's work in one call over an axis: matmul, einsum, scaled_dot_product_attention.",
)
