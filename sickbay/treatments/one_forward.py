"""What generates is the forward that was trained, with or without a cache.

Advice: call the model itself in the sampling loop. With a cache, the new token's position is the number of tokens in the cache, and its
query may see all of them; test it by comparing the last logits with those of a forward over the whole sequence.
"""

from __future__ import annotations

from sickbay.core.treatment import Treatment

treatment = Treatment(
    id="one-forward",
    safety="advice",
    summary="Generate with the trained forward; beside a cache, number the new token's position from the cache's length.",
)
