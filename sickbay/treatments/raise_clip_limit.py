"""The clip is an exception again.

Set `max_norm` to about twice the median gradient norm of a healthy stretch. Under SGD this lengthens every step: divide the learning rate
by the same factor first.
"""

from __future__ import annotations

from sickbay.core.treatment import Treatment

treatment = Treatment(
    id="raise-clip-limit",
    safety="advice",
    summary="Set the clipping limit to about twice the median gradient norm, or lower the learning rate.",
)
