"""What the user chose for one run; carried from the supervisor to the watched process as JSON."""

from __future__ import annotations

import dataclasses
import json
import os
from dataclasses import dataclass

MEGABYTE = 1 << 20


@dataclass(frozen=True)
class Settings:
    """The options of one watched run.

    `out`: the run's folder; `max_steps`: optimizer steps after which the script is ended, 0 = never; `max_record_bytes`: bound of one
    rank's record.
    """

    out: str = ""
    select: tuple[str, ...] = ()
    ignore: tuple[str, ...] = ()
    max_steps: int = 0
    debug: bool = False
    max_record_bytes: int = 256 * MEGABYTE

    def to_json(self) -> str:
        return json.dumps(dataclasses.asdict(self))

    @classmethod
    def from_json(cls, text: str) -> Settings:
        fields = json.loads(text)
        return cls(**{**fields, "select": tuple(fields["select"]), "ignore": tuple(fields["ignore"])})


def switched_off() -> bool:
    """True when SICKBAY=0 asks that nothing be watched."""
    return os.environ.get("SICKBAY", "") == "0"
