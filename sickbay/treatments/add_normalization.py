"""Each block normalises what it reads: pre-norm.

`x = x + attention(norm1(x)); x = x + feed_forward(norm2(x))` with `nn.LayerNorm(dim)` or `nn.RMSNorm(dim)`, and one more
norm between the last block and the head. Pre-norm trains without warm-up; post-norm, `norm(x + f(x))`, needs one
(Xiong et al. 2020).
"""

from __future__ import annotations

from sickbay.core.treatment import Treatment

treatment = Treatment(
    id="add-normalization",
    safety="advice",
    summary="Normalise the input of each attention and feed-forward part, and once before the head.",
)
