"""How many bytes the C allocator has given out, without its reserve: the resident size of a process grows by fragments too."""

from __future__ import annotations

import ctypes
from typing import Any

_FIELDS = ("arena", "ordblks", "smblks", "hblks", "hblkhd", "usmblks", "fsmblks", "uordblks", "fordblks", "keepcost")
_SERVED = 1 / 16  # of the resident bytes: where less comes from glibc, another allocator serves the process


class _Mallinfo(ctypes.Structure):
    """struct mallinfo2 of glibc 2.33, mallinfo(3)."""

    _fields_ = [(name, ctypes.c_size_t) for name in _FIELDS]


class Heap:
    """Asks glibc's allocator; a question takes some hundred microseconds."""

    def __init__(self) -> None:
        self._ask: Any = None
        try:
            self._ask = ctypes.CDLL(None).mallinfo2
            self._ask.restype = _Mallinfo
        except (OSError, AttributeError):
            self._ask = None

    def bytes_in_use(self, resident: int) -> int | None:
        """Bytes in use of a process of `resident` bytes; None where the allocator cannot tell."""
        if self._ask is None:
            return None
        told = self._ask()
        size = int(told.uordblks + told.hblkhd)
        return size if size > _SERVED * resident else None
