"""Evaluation builds no graph and keeps numbers instead of outputs.

Advice: `with torch.no_grad():` (or inference_mode) around it; add up loss and counts batch by batch; in transformers' Trainer
preprocess_logits_for_metrics or eval_accumulation_steps.
"""

from __future__ import annotations

from sickbay.core.treatment import Treatment

treatment = Treatment(
    id="evaluate-lightly",
    safety="advice",
    summary="Evaluate under torch.no_grad() and reduce each batch to numbers at once instead of keeping its outputs.",
)
