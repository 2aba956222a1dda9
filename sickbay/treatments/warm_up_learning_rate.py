"""The learning rate rises linearly over the first steps.

torch: `SequentialLR(optimizer, [LinearLR(optimizer, 0.01, total_iters=n), main], milestones=[n])`; transformers: `warmup_steps=n`;
by hand: `group["lr"] = peak * min(1, (step + 1) / n)`. n is 1 to 10 % of the run, and no less than a few dozen steps under Adam.
"""

from __future__ import annotations

from sickbay.core.treatment import Treatment

treatment = Treatment(
    id="warm-up-learning-rate",
    safety="advice",
    summary="Let the learning rate rise linearly over the first 1 to 10 % of the steps.",
)
