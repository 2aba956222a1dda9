"""pytest's plugin: the `sickbay` fixture makes a model's checkup a test.

    def test_my_model(sickbay):
        sickbay.assert_healthy(model, batches, loss)

`@pytest.mark.sickbay(skip=["throughput"], seconds=10)` sets the options for one test. Loads neither torch nor sickbay before it is used.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import pytest

if TYPE_CHECKING:
    from sickbay.checklist.result import Checklist

_OPTIONS = ("only", "skip", "seconds")


@dataclass(frozen=True)
class Sickbay:
    """What the fixture gives. `options`: those of the test's marker; an option of a call goes before them."""

    options: Mapping[str, Any]

    def checkup(
        self, model: Any, batches: Any, loss_fn: Callable[..., Any] | None = None, optimizer: Any = None, **options: Any
    ) -> Checklist:
        """The checklist, as `sickbay.checkup` gives it."""
        import sickbay

        return sickbay.checkup(model, batches, loss_fn, optimizer, **{**self.options, **options})

    def assert_healthy(
        self, model: Any, batches: Any, loss_fn: Callable[..., Any] | None = None, optimizer: Any = None, **options: Any
    ) -> Checklist:
        """The checklist if nothing was found; the test fails, with the checklist as its message, on a critical or a warning."""
        __tracebackhide__ = True
        checklist = self.checkup(model, batches, loss_fn, optimizer, **options)
        if checklist.verdict != "healthy":
            pytest.fail(str(checklist), pytrace=False)
        return checklist


def pytest_configure(config: pytest.Config) -> None:
    """The marker is known to pytest."""
    config.addinivalue_line("markers", "sickbay(only=[...], skip=[...], seconds=S): options of the checkups that the test makes")


@pytest.fixture
def sickbay(request: pytest.FixtureRequest) -> Sickbay:
    """Checks models up: `sickbay.assert_healthy(model, batches, loss)`, `sickbay.checkup(...)`."""
    marker = request.node.get_closest_marker("sickbay")
    options = dict(marker.kwargs) if marker is not None else {}
    unknown = sorted(set(options) - set(_OPTIONS)) or ([str(marker.args)] if marker is not None and marker.args else [])
    if unknown:
        raise pytest.UsageError(f"the marker sickbay takes {', '.join(_OPTIONS)}, not {unknown[0]}")
    return Sickbay(options)
