"""Attention scores are bounded by construction.

`query = norm_q(query); key = norm_k(key)` per head (`nn.RMSNorm(head_dim)`), before the rotary embedding and the product (Dehghani et
al. 2023). For a model that exists already: cap the scores, `50 * torch.tanh(scores / 50)`, add `1e-4 * logsumexp(logits).square()`
to the loss, or lower the learning rate.
"""

from __future__ import annotations

from sickbay.core.treatment import Treatment

treatment = Treatment(
    id="qk-norm",
    safety="advice",
    summary="Normalise queries and keys per head before their product.",
)
