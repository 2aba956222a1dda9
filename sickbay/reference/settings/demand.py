"""How settings are checked: a value outside its range is refused with the field, the value and the range."""

from __future__ import annotations

import math


def demand(field: str, value: object, holds: bool, allowed: str) -> None:
    """Raises ValueError unless `holds`; `allowed` ends "it must be ..."."""
    if not holds:
        raise ValueError(f"{field} is {value!r}; it must be {allowed}")


def is_count(value: object, least: int = 1) -> bool:
    """An integer of at least `least`; True and False are no integers here."""
    return isinstance(value, int) and not isinstance(value, bool) and value >= least


def is_number(value: object) -> bool:
    """An integer or a float that is finite; True and False are no numbers here."""
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)
