"""Every error sickbay raises on purpose.

SickbayError
├── UsageError          the command line or a setting is wrong; says what was received and the way out
├── RecordError         a run's record cannot be read or written
└── MalformedCondition  a file in conditions/ breaks the common form; names file and line
"""

from __future__ import annotations


class SickbayError(Exception):
    """The root: catching it catches everything sickbay raises on purpose."""


class UsageError(SickbayError):
    """Raised for what the user can mend: the text says what was wrong, where, and the way out."""


class RecordError(SickbayError):
    """Raised when a run's folder or record cannot be used."""


class MalformedCondition(SickbayError):
    """Raised at discovery for a condition, treatment, probe or exam file that breaks the common form."""
