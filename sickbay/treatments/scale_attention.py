"""The attention scores are divided by the square root of one head's width, once.

`scores = query @ key.transpose(-2, -1) * head_dim**-0.5` with `head_dim = query.shape[-1]` after the heads were split.
`scaled_dot_product_attention(query, key, value)` does it by default: then scale neither queries nor keys before it, and pass
no `scale`.
"""

from __future__ import annotations

from sickbay.core.treatment import Treatment

treatment = Treatment(
    id="scale-attention",
    safety="advice",
    summary="Multiply attention scores by head_dim ** -0.5, once.",
)
