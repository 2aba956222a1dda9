"""Inputs and targets of zero mean and unit variance.

`x = (x - mean) / std` with the training set's numbers per feature, the same for a regression's targets; what is reported is scaled back.
Images: divide by 255 and standardise per channel (LeCun et al. 1998, section 4.3).
"""

from __future__ import annotations

from sickbay.core.treatment import Treatment

treatment = Treatment(
    id="scale-data",
    safety="advice",
    summary="Standardise inputs and targets with the training set's mean and standard deviation.",
)
