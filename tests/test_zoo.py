"""Scripts as different people write them, sick and healthy: the right cause comes first, and health stays unremarked.

The fast ones of tests/zoo; `python bench/zoo.py` runs all of them.
"""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "bench"))
import zoo

CASES = zoo.cases()


@pytest.mark.parametrize("case", [case for case in CASES if case.fast], ids=lambda case: case.name)
def test_the_cause_comes_first_and_nothing_else_is_alarming(case: zoo.Case, tmp_path: Path) -> None:
    result = zoo.run(case, tmp_path / "run")
    assert not result.problem
    assert not result.alarms, result.found
    assert result.first(1) or not case.expected, result.found


def test_every_sick_script_has_a_healthy_run_beside_it() -> None:
    healthy = {case.script for case in CASES if not case.expected}
    assert {case.script for case in CASES if case.expected} <= healthy
    assert {path.name for path in zoo.ZOO.glob("*.py")} == {case.script for case in CASES}
