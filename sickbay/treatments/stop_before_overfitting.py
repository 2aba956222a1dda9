"""The weights kept are those of the lowest validation loss, or the model has more to learn from.

Advice: keep the checkpoint with the best validation loss and stop a few evaluations after it; more or augmented data; dropout 0.1 to 0.3,
weight decay 0.1, fewer epochs, a smaller model, or a pretrained one.
"""

from __future__ import annotations

from sickbay.core.treatment import Treatment

treatment = Treatment(
    id="stop-before-overfitting",
    safety="advice",
    summary="Keep the weights of the lowest validation loss; more data, dropout, weight decay or fewer epochs.",
)
