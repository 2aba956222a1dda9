"""Runs a case of the reference under sickbay's watch: what the demo, the tests and the confusion matrix share."""

from __future__ import annotations

import contextlib
import io
import os

import sickbay
from sickbay.reference.case import Case, run


def watched(case: Case, folder: str | os.PathLike[str]) -> tuple[sickbay.Checkup, BaseException | None]:
    """The checkup over a watched run of `case` recorded in `folder`, and the exception that ended it, if one did."""
    failure: BaseException | None = None
    doctor = None
    # A planted fault may print or raise as a user's script would; neither belongs on the caller's screen.
    with contextlib.redirect_stdout(io.StringIO()):
        try:
            with sickbay.watch(out=folder) as doctor:
                run(case)
        except Exception as problem:
            failure = problem
    assert doctor is not None
    return doctor.checkup(), failure
