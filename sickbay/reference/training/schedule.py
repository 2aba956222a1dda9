"""The learning rate of each step, as a function of the step alone: asking for it changes nothing."""

from __future__ import annotations

import math

from sickbay.reference.settings.recipe import Recipe, Schedule


def scheduled(recipe: Recipe, step: int) -> float:
    """The learning rate of `step`, counted from 0."""
    return learning_rate_at(
        step,
        peak=recipe.learning_rate,
        floor=recipe.floor,
        warmup=recipe.warmup,
        steps=recipe.steps,
        schedule=recipe.schedule,
        decay_share=recipe.decay_share,
    )


def learning_rate_at(
    step: int, *, peak: float, floor: float, warmup: int, steps: int, schedule: Schedule = "cosine", decay_share: float = 0.2
) -> float:
    """Linear rise over `warmup` steps to `peak`, then by `schedule` down to `floor` at `steps`, and `floor` ever after.

    "cosine" (Loshchilov & Hutter 2017) and "linear" fall from the warm-up on, "wsd" in the last `decay_share` of all steps
    (warm-up, stable, decay: Hu et al. 2024, MiniCPM), "constant" never.
    """
    if step < warmup:
        return peak * (step + 1) / (warmup + 1)
    if schedule == "constant":
        return peak
    begin = max(warmup, min(steps - 1, round(steps * (1 - decay_share)))) if schedule == "wsd" else warmup
    progress = min(1.0, max(0.0, (step - begin) / max(1, steps - begin)))
    if schedule == "cosine":
        return floor + 0.5 * (1.0 + math.cos(math.pi * progress)) * (peak - floor)
    return peak + progress * (floor - peak)
