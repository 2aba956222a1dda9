"""When to stop: the validation loss has not got better for a while (Prechelt 1998)."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any


class Patience:
    """Waits `evaluations` evaluations in a row for a lower loss; None = for ever."""

    def __init__(self, evaluations: int | None) -> None:
        self.evaluations = evaluations
        self.best, self.waited = math.inf, 0

    def improves(self, loss: float) -> bool:
        """Whether `loss` is the lowest so far; it has been counted."""
        better = loss < self.best
        self.best, self.waited = (loss, 0) if better else (self.best, self.waited + 1)
        return better

    def state(self) -> dict[str, float | int | None]:
        """What `restore` needs to go on waiting; JSON."""
        return {"best": self.best if math.isfinite(self.best) else None, "waited": self.waited}

    def restore(self, state: Mapping[str, Any]) -> None:
        """It has waited as it had when it told `state`."""
        best = state.get("best")
        self.best, self.waited = math.inf if best is None else best, state.get("waited", 0)

    @property
    def over(self) -> bool:
        return self.evaluations is not None and self.waited >= self.evaluations
