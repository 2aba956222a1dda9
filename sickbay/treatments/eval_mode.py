"""Evaluation runs without dropout and with batch-norm's stored statistics.

Advice: model.eval() first, torch.no_grad() or inference_mode() around it, model.train() after it.
"""

from __future__ import annotations

from sickbay.core.treatment import Treatment

treatment = Treatment(
    id="eval-mode",
    safety="advice",
    summary="Call model.eval() before evaluating and generating, and model.train() after.",
)
