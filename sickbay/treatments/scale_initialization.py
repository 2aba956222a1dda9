"""Weights start random and of a size that keeps activations as they are.

`nn.init.normal_(weight, std=0.02)` for matrices and embeddings, `0.02 / sqrt(2 * layers)` for those that write to the residual stream
(Radford et al. 2019); or `nn.init.xavier_uniform_` / `kaiming_normal_`, once and not on top of another scale. Constants are for
biases, norms, and outputs that are to start at zero.
"""

from __future__ import annotations

from sickbay.core.treatment import Treatment

treatment = Treatment(
    id="scale-initialization",
    safety="advice",
    summary="Draw matrices at random by fan-in or normal(0, 0.02), residual outputs 1/sqrt(2 x layers) of that; never constant.",
)
