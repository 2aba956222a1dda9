"""A treatment: a change that cures a condition, and how safe it is."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

Safety = Literal["safe", "changes-training", "advice"]


@dataclass(frozen=True)
class Treatment:
    """One cure. `safe`: same mathematics; `changes-training`: different numbers from here on; `advice`: the user's hand is needed.

    `apply(patient, **params)` makes the change on the live run and returns the function that undoes it; None for advice.
    """

    id: str
    safety: Safety
    summary: str
    apply: Callable[..., Callable[[], None]] | None = None
    doc: str = ""

    def on(self, patient: Any, **params: Any) -> Callable[[], None]:
        """Apply to `patient`; raises ValueError for advice, which only a person can follow."""
        if self.apply is None:
            raise ValueError(f"{self.id} is advice: {self.summary}")
        return self.apply(patient, **params)
