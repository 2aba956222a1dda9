"""The model has room for what the data hold.

Advice: double the width or the number of blocks and compare both at the same number of tokens; about twenty tokens per parameter is where
a larger model begins to pay (Hoffmann et al. 2022).
"""

from __future__ import annotations

from sickbay.core.treatment import Treatment

treatment = Treatment(
    id="grow-model",
    safety="advice",
    summary="Try twice the width or depth on the same tokens, and keep it if validation loss falls.",
)
