"""Each position sees itself and all earlier ones, and none later.

Advice: `scaled_dot_product_attention(q, k, v, is_causal=True)`, or `scores.masked_fill(~torch.ones(T, T).tril().bool(), -inf)` before the
softmax. In nn.MultiheadAttention a boolean mask means the opposite: True is hidden. Pad convolutions on the left only.
"""

from __future__ import annotations

from sickbay.core.treatment import Treatment

treatment = Treatment(
    id="causal-mask",
    safety="advice",
    summary="Mask so that position t sees 0..t and nothing later: scaled_dot_product_attention(..., is_causal=True).",
)
