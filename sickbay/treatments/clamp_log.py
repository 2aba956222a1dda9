"""The argument of the logarithm or root stays away from zero.

`log_softmax(x)` instead of `softmax(x).log()`; `x.clamp(min=1e-12).log()`; `(x + 1e-12).sqrt()`; norms of differences as
`(difference.pow(2).sum(-1) + 1e-12).sqrt()`. The guard comes before the operation: afterwards the forward pass looks right and
the derivative is still infinite. With `torch.where`, replace the argument inside as well.
"""

from __future__ import annotations

from sickbay.core.treatment import Treatment

treatment = Treatment(
    id="clamp-log",
    safety="advice",
    summary="Use log_softmax for probabilities; otherwise add an eps or clamp before the log, root or norm.",
)
