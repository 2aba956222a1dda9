"""What all tests share."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path

import charts
import pytest

from sickbay.core.chart import Chart
from sickbay.reference.data import shipped_text


@pytest.fixture
def chart() -> Callable[..., Chart]:
    """`chart(grad_norm=[1, 1.2, 60], facts={...})`; see charts.py."""
    return charts.chart


@pytest.fixture
def text(tmp_path: Path) -> Path:
    """A file with the beginning of the shipped text, enough to train the smallest models on."""
    path = tmp_path / "text.txt"
    path.write_text(shipped_text().read_text(encoding="utf-8")[:4000], encoding="utf-8")
    return path


@pytest.fixture(autouse=True)
def _nothing_compiled() -> None:
    """What an earlier test compiled must not keep the line recorder off: a process that compiles is another case."""
    compiler = sys.modules.get("torch._dynamo.eval_frame")
    if compiler is not None and getattr(compiler, "cached_backends", None):
        sys.modules["torch._dynamo"].reset()  # type: ignore[attr-defined]
