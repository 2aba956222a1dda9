"""Gradients reach the early layers: a way around each nonlinearity, and no saturated gate on it.

`x = x + f(norm(x))` in place of `x = f(x)`; ReLU, GELU or SiLU in place of sigmoid and tanh between layers; Xavier or He initialisation;
gate biases near 0. Deep post-norm stacks need warm-up or DeepNorm's scales (Wang et al. 2022).
"""

from __future__ import annotations

from sickbay.core.treatment import Treatment

treatment = Treatment(
    id="shorten-gradient-path",
    safety="advice",
    summary="Add residual connections with pre-norm, use ReLU or GELU between layers, start gates open.",
)
