"""Steps slept through early in a run, so that short trainings have some."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from sickbay.probes import pace


def sleep_after(steps: int, set_attribute: Callable[[Any, str, Any], None]) -> None:
    """After `steps` that are looked at closely, as many as can be are only glanced at. `set_attribute`: setattr, or a monkeypatch's."""
    set_attribute(pace, "CLOSELY", steps)
    set_attribute(pace, "_KEPT", 1)
    set_attribute(pace.Pace, "_choose", lambda self: setattr(self, "every", pace.RAREST))
