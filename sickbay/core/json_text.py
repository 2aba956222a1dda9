"""JSON that every parser accepts and that loses no float: NaN and infinities travel as `{"$float": "nan"}`."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

_FLOAT, _DICT = "$float", "$dict"
_NONFINITE = {"nan": float("nan"), "inf": float("inf"), "-inf": float("-inf")}
MAX_NOTE = 16_384  # characters of one note


def to_text(value: Any) -> str:
    """`value` as strict ASCII JSON. Tuples and sets become lists, numpy scalars numbers, keys and anything else unknown text."""
    try:
        text = json.dumps(value, allow_nan=False, separators=(",", ":"))
    except (TypeError, ValueError):
        return json.dumps(_plain(value), allow_nan=False, separators=(",", ":"))
    if _FLOAT in text or _DICT in text:  # the user's own data uses our marks: escape them
        return json.dumps(_plain(value), allow_nan=False, separators=(",", ":"))
    return text


def from_text(text: str) -> Any:
    """The value that `to_text` was given. Raises ValueError for text that is not JSON."""
    return json.loads(text, object_hook=_marked) if "$" in text else json.loads(text)


def _marked(fields: dict[str, Any]) -> Any:
    if len(fields) == 1:
        if isinstance(fields.get(_FLOAT), str):
            return _NONFINITE[fields[_FLOAT]]
        if isinstance(fields.get(_DICT), list):
            return dict(fields[_DICT])
    return fields


def _plain(value: Any) -> Any:
    if value is None or isinstance(value, (bool, str)):
        return value
    if isinstance(value, int):
        return int(value)
    if isinstance(value, float):
        return float(value) if abs(value) < float("inf") else {_FLOAT: str(float(value))}
    if isinstance(value, Mapping):
        pairs = [[str(key), _plain(item)] for key, item in value.items()]
        return {_DICT: pairs} if any(key in (_FLOAT, _DICT) for key, _ in pairs) else dict(pairs)
    if isinstance(value, (list, tuple)):
        return [_plain(item) for item in value]
    if isinstance(value, (set, frozenset)):
        return [_plain(item) for item in sorted(value, key=repr)]
    if hasattr(value, "tolist") and getattr(value, "size", 0) is not None:
        return _plain(value.tolist())
    return str(value)


def short_text(note: Mapping[str, Any]) -> str:
    """`note` as JSON; long lists and texts in it are cut until it has at most MAX_NOTE characters."""
    text, limit = to_text(note), 1_024
    if len(text) > MAX_NOTE:
        kept = from_text(text)
        while len(text) > MAX_NOTE and limit:
            kept = _cut(kept, limit)
            text, limit = to_text(kept), limit // 2
    return text


def _cut(value: Any, limit: int) -> Any:
    if isinstance(value, str):
        return value if len(value) <= 4 * limit else value[: 4 * limit] + "…"
    if isinstance(value, list):
        return [_cut(item, limit) for item in value[:limit]]
    if isinstance(value, dict):
        return {key: _cut(item, limit) for key, item in list(value.items())[: max(limit, 32)]}
    return value
