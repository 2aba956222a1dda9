"""ReLU units that were zero for every input get a gradient again, through a small slope below zero.

The slope 0.01 is that of Maas et al. 2013 and torch's default. Undoing puts the ReLU modules back. ReLU called as a function is not
reached; there, lower the learning rate, warm up, or use GELU.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from sickbay.core.treatment import Treatment


def apply(patient: Any) -> Callable[[], None]:
    """Every nn.ReLU of `patient.root` is an nn.LeakyReLU. Raises ValueError when there is none."""
    from torch import nn

    root = patient.root
    places = [
        (parent, name, child)
        for parent in (root.modules() if root is not None else ())
        for name, child in parent.named_children()
        if type(child) is nn.ReLU
    ]
    if not places:
        raise ValueError("revive-relu: the model has no nn.ReLU module to replace; use leaky_relu or gelu where relu is called")
    for parent, name, child in places:
        setattr(parent, name, nn.LeakyReLU(inplace=child.inplace))

    def undo() -> None:
        for parent, name, child in places:
            setattr(parent, name, child)

    return undo


treatment = Treatment(
    id="revive-relu",
    safety="changes-training",
    summary="Use GELU or a leaky ReLU, He initialisation, and a lower learning rate or warm-up.",
    apply=apply,
)
