"""The loss gets raw scores: no softmax, sigmoid or tanh between the last layer and the loss.

`cross_entropy` is log-softmax and negative log-likelihood in one, `binary_cross_entropy_with_logits` has its sigmoid inside, and `nll_loss`
wants `log_softmax` before it. Probabilities for display come from the same scores, outside the loss.
"""

from __future__ import annotations

from sickbay.core.treatment import Treatment

treatment = Treatment(
    id="raw-logits",
    safety="advice",
    summary="Give the loss the raw output of the last linear layer.",
)
