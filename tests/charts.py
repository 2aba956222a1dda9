"""`chart(grad_norm=[1, 1.2, 60])`: a chart in one line."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from sickbay.core.chart import Chart, Reading
from sickbay.core.signals import SIGNALS

Values = Sequence[float | Reading] | Mapping[int, float]


def chart(facts: Mapping[str, Any] | None = None, unobserved: Mapping[str, str] | None = None, **signals: Values) -> Chart:
    """Each signal's values are a list (steps 0, 1, ...), a dict of step to value, or a list of Readings. Raises ValueError for a typo."""
    readings: list[Reading] = []
    for signal, values in signals.items():
        if signal not in SIGNALS:
            raise ValueError(f"{signal!r} is no signal of core/signals.py")
        pairs = values.items() if isinstance(values, Mapping) else enumerate(values)
        for step, value in pairs:
            if isinstance(value, Reading):
                if value.signal != signal:
                    raise ValueError(f"a reading of {value.signal!r} was given as {signal!r}")
                readings.append(value)
            else:
                readings.append(Reading(step, signal, float(value)))
    return Chart(readings, facts, unobserved)
