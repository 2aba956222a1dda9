"""Chance has a smaller part in the choice of the next token.

Advice: divide the logits, once and before the only softmax, by a temperature of 0.7 to 1, then keep the 50 likeliest tokens (top-k) or
the likeliest of 0.9 probability together (top-p, at least one).
"""

from __future__ import annotations

from sickbay.core.treatment import Treatment

treatment = Treatment(
    id="lower-temperature",
    safety="advice",
    summary="Divide the logits by a temperature of 0.7 to 1 and keep the likeliest tokens (top-k 50 or top-p 0.9).",
)
