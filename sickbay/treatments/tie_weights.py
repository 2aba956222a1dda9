"""Embedding and head share one weight again.

The embedding's weight is the one kept, as in transformers' tie_weights. The head's own copy stays in the optimizer without a gradient,
and so without effect. Undoing gives the head its copy back.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from sickbay.core.treatment import Treatment


def apply(patient: Any, pair: Sequence[str]) -> Callable[[], None]:
    """The second weight named in `pair` (`"head"` or `"head.weight"`) is the first (`"embedding"`).

    Raises ValueError when no model was seen, a name is not a parameter of it, or the two shapes differ.
    """
    if patient.root is None:
        raise ValueError("tie-weights: no model was seen yet, so there is nothing to tie")
    weights = dict(patient.root.named_parameters(remove_duplicate=False))
    pair = [name if name in weights else f"{name}.weight" for name in pair]
    missing = [name for name in pair if name not in weights]
    if len(pair) != 2 or missing:
        raise ValueError(f"tie-weights: pair={tuple(pair)} must name two parameters of the model; unknown: {', '.join(missing) or 'none'}")
    kept, replaced = weights[pair[0]], weights[pair[1]]
    if kept.shape != replaced.shape:
        raise ValueError(f"tie-weights: {pair[0]} has shape {tuple(kept.shape)} and {pair[1]} {tuple(replaced.shape)}; they must be equal")
    path, _, attribute = pair[1].rpartition(".")
    owner = patient.root.get_submodule(path)
    setattr(owner, attribute, kept)

    def undo() -> None:
        setattr(owner, attribute, replaced)

    return undo


treatment = Treatment(
    id="tie-weights",
    safety="changes-training",
    summary="Tie again after loading and before building the optimizer: head.weight = embedding.weight.",
    apply=apply,
)
