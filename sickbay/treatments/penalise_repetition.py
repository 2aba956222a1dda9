"""Tokens that were said already are less likely to be said again.

Advice: multiply the log-probabilities (log_softmax, never above zero) of the distinct tokens so far by 1.1 to 1.3, once each, before
the temperature. Dividing raw logits makes those below zero likelier, and once per occurrence makes frequent words impossible.
"""

from __future__ import annotations

from sickbay.core.treatment import Treatment

treatment = Treatment(
    id="penalise-repetition",
    safety="advice",
    summary="Multiply the log-probabilities of the distinct tokens said so far by 1.2, once each, before sampling.",
)
