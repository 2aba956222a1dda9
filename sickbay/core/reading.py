"""The one kind of datum that travels from probes to conditions."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True, slots=True)
class Reading:
    """One measured number: at optimizer step `step`, of `signal`, at `where` (a module's or parameter's path), from the user's `source`."""

    step: int
    signal: str
    value: float
    where: str = ""
    note: Mapping[str, Any] = field(default_factory=dict)
    source: str = ""
    seconds: float = 0.0
