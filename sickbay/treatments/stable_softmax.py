"""The largest logit is subtracted before the exponential.

`torch.softmax(x, dim=-1)` instead of `x.exp() / x.exp().sum(-1, keepdim=True)`; `torch.logsumexp(x, -1)` instead of
`x.exp().sum(-1).log()`; `cross_entropy(logits, targets)` instead of the logarithm of a softmax. By hand:
`x = x - x.amax(dim=-1, keepdim=True)` first. The result is the same number wherever both are finite.
"""

from __future__ import annotations

from sickbay.core.treatment import Treatment

treatment = Treatment(
    id="stable-softmax",
    safety="advice",
    summary="Use torch.softmax, logsumexp or cross_entropy, which subtract the maximum; or subtract it by hand before exp.",
)
