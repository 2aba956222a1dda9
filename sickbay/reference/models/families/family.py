"""What a file of this folder says of its family: its settings in our words and back, and where each weight stands."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from sickbay.core.errors import UsageError
from sickbay.reference.models.config import Config
from sickbay.reference.settings.demand import is_count

Fields = Mapping[str, Any]


@dataclass(frozen=True)
class Weight:
    """One of our weights by its name, and theirs: several where ours is a stack of them. `transposed`: theirs is `(inputs, outputs)`."""

    ours: str
    theirs: tuple[str, ...]
    transposed: bool = False


@dataclass(frozen=True)
class Family:
    """`model_type` and `architecture` as transformers' config.json has them.

    `prefix`: of all tensors but the head's, in a checkpoint that has a head. `ignored`: a pattern of tensors that are no weights.
    `read` makes a Config of the fields of a config.json, `write` such fields of a Config. `read` raises UsageError naming the field that
    our model cannot do; `write` is given only what the family can.
    """

    model_type: str
    architecture: str
    prefix: str
    ignored: str
    read: Callable[[Fields], Config]
    write: Callable[[Config], dict[str, Any]]
    weights: Callable[[Config], list[Weight]]


def demand_only(fields: Fields, allowed: Mapping[str, tuple[Any, ...]]) -> None:
    """Raises UsageError where a field is there and is none of what it is `allowed` to be."""
    for field, values in allowed.items():
        if field in fields and fields[field] not in values:
            can = " or ".join(repr(value) for value in values)
            raise UsageError(f"{field} is {fields[field]!r}; this model can do {can} only")


def count(fields: Fields, field: str) -> int:
    """The field's value. Raises UsageError where it is missing or no integer of at least 1."""
    value = fields.get(field)
    if not is_count(value):
        raise UsageError(f"{field} is {'missing' if value is None else repr(value)}; it must be an integer of at least 1")
    return int(value)  # type: ignore[arg-type]
