"""Each input lies beside its own target when the loss sees them.

Advice: print ten decoded inputs beside their targets as they leave the loader; shuffle inputs and targets with one permutation, or
shuffle indices; look for inputs that are all alike (unknown tokens, zeroed features), then overfit ten examples again.
"""

from __future__ import annotations

from sickbay.core.treatment import Treatment

treatment = Treatment(
    id="match-inputs-targets",
    safety="advice",
    summary="Look at ten examples as they reach the model; shuffle inputs and targets with one permutation.",
)
