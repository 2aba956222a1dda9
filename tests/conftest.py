"""What all tests share."""

from __future__ import annotations

from collections.abc import Callable

import charts
import pytest

from sickbay.core.chart import Chart


@pytest.fixture
def chart() -> Callable[..., Chart]:
    """`chart(grad_norm=[1, 1.2, 60], facts={...})`; see charts.py."""
    return charts.chart
