"""sickbay watches a transformer's training, names what is wrong with evidence and the user's own line, and says how to cure it.

    import sickbay
    with sickbay.watch(model, optimizer) as doctor:
        train()
    print(doctor.checkup())

Importing this loads no torch; `watch` does.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

_HOMES = {
    "watch": "sickbay.doctor",
    "checkup": "sickbay.checklist.conduct",
    "diagnose": "sickbay.registry",
    "explain": "sickbay.registry",
    "Chart": "sickbay.core.chart",
    "Reading": "sickbay.core.chart",
    "Condition": "sickbay.core.condition",
    "Checkup": "sickbay.core.diagnosis",
    "Diagnosis": "sickbay.core.diagnosis",
    "Evidence": "sickbay.core.diagnosis",
    "Threshold": "sickbay.core.diagnosis",
    "Treatment": "sickbay.core.treatment",
    "SickbayError": "sickbay.core.errors",
}

# Spelled out, not derived: type checkers read it without running it.
__all__ = [
    "Chart",
    "Checkup",
    "Condition",
    "Diagnosis",
    "Evidence",
    "Reading",
    "SickbayError",
    "Threshold",
    "Treatment",
    "__version__",
    "checkup",
    "diagnose",
    "explain",
    "watch",
]

if TYPE_CHECKING:
    from sickbay.checklist.conduct import checkup
    from sickbay.core.chart import Chart, Reading
    from sickbay.core.condition import Condition
    from sickbay.core.diagnosis import Checkup, Diagnosis, Evidence, Threshold
    from sickbay.core.errors import SickbayError
    from sickbay.core.treatment import Treatment
    from sickbay.doctor import watch
    from sickbay.registry import diagnose, explain


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'sickbay' has no attribute {name!r}")
    return getattr(importlib.import_module(_HOMES[name]), name)


def __dir__() -> list[str]:
    return sorted(__all__)
