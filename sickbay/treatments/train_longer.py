"""The model is trained until its loss is below what counting neighbouring tokens gives.

Advice: more steps, with the learning-rate schedule stretched to the new length; where the loss falls very slowly, find a higher learning
rate by a range test first.
"""

from __future__ import annotations

from sickbay.core.treatment import Treatment

treatment = Treatment(
    id="train-longer",
    safety="advice",
    summary="Train for more steps, with the schedule stretched to the new length.",
)
