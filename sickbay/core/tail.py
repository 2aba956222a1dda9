"""The steps between two commits, in a small file beside the record: one system call a step, and nothing is lost to a kill.

Each entry checks itself and names its step. A reader that took the tail before the record has, between both, every step.
"""

from __future__ import annotations

import contextlib
import os
import struct
import zlib
from pathlib import Path
from typing import Any

Step = tuple[int, int, float, bytes, bytes, str]  # first, last, seconds, scalars, tables, extras: a row of `steps`

ROOM = 1 << 20  # bytes; what does not fit is committed
_HEAD = struct.Struct("<II")  # length and checksum of the rest
_FIELDS = struct.Struct("<IIdIII")


def path_beside(record: Path) -> Path:
    """`record-0.tail` for `record-0.sqlite`."""
    return record.with_suffix(".tail")


class Tail:
    """The one writer of a record's tail. Where it cannot be written, `keep` says so and the record commits every step."""

    def __init__(self, record: Path) -> None:
        self._path = path_beside(record)
        self._at = 0
        self._file = -1
        with contextlib.suppress(OSError):
            self._file = os.open(self._path, os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, 0o644)

    def keep(self, step: Step) -> bool:
        """True when `step` survives a kill of this process."""
        first, last, seconds, scalars, tables, extras = step
        text = extras.encode("utf-8", "surrogatepass")
        body = _FIELDS.pack(first, last, seconds, len(scalars), len(tables), len(text)) + scalars + tables + text
        entry = _HEAD.pack(len(body), zlib.crc32(body)) + body
        if self._file < 0 or self._at + len(entry) > ROOM:
            return False
        try:
            kept = os.pwrite(self._file, entry, self._at) == len(entry)
        except OSError:
            return False
        self._at += len(entry) if kept else 0
        return kept

    def committed(self) -> None:
        """What was kept is in the record now: the room is free again."""
        self._at = 0

    def close(self) -> None:
        """The file is gone."""
        if self._file >= 0:
            with contextlib.suppress(OSError):
                os.close(self._file)
                self._path.unlink()
            self._file = -1


def content_of(record: Path) -> bytes:
    """The tail of `record` as it is now; empty where there is none."""
    try:
        return path_beside(record).read_bytes()
    except OSError:
        return b""


def steps_after(last: int, content: bytes) -> list[Step]:
    """The steps in a tail's `content` that come after step `last` (-1: none is committed)."""
    found: list[Step] = []
    at = 0
    while at + _HEAD.size <= len(content):
        length, checksum = _HEAD.unpack_from(content, at)
        body = content[at + _HEAD.size : at + _HEAD.size + length]
        if len(body) != length or length < _FIELDS.size or zlib.crc32(body) != checksum:
            break  # what lies behind is left from before the last commit
        first, until, seconds, *sizes = _FIELDS.unpack_from(body)
        parts: list[Any] = []
        place = _FIELDS.size
        for size in sizes:
            parts.append(body[place : place + size])
            place += size
        if first > last:
            found.append((first, until, seconds, parts[0], parts[1], parts[2].decode("utf-8", "surrogatepass")))
            last = until
        at += _HEAD.size + length
    return found
