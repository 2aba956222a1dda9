"""Keeping parts of a model as they are while the rest is trained."""

from __future__ import annotations

from collections.abc import Sequence
from fnmatch import fnmatchcase

from torch import nn

from sickbay.core.errors import UsageError


def freeze(model: nn.Module, patterns: Sequence[str]) -> list[str]:
    """The names of the parameters that are no longer trained: those that a pattern matches, or that lie within a module it matches.

    "token_embedding", "blocks.0", "blocks.[0-3]", "*.feed_forward", "*norm.bias". A shared weight is frozen under any of its names.
    Raises UsageError for a pattern that matches nothing, or where nothing would be left to train; then nothing is frozen.
    """
    parameters = dict(model.named_parameters(remove_duplicate=False))
    frozen: dict[str, nn.Parameter] = {}
    for pattern in patterns:
        found = {name: weight for name, weight in parameters.items() if fnmatchcase(name, pattern) or fnmatchcase(name, f"{pattern}.*")}
        if not found:
            parts = dict.fromkeys(name.partition(".")[0] for name in parameters)
            raise UsageError(f"freeze: no parameter is called {pattern!r}; there are {', '.join(parts)}, and names within them")
        frozen |= found
    gone = {id(weight) for weight in frozen.values()}
    if all(id(weight) in gone or not weight.requires_grad for weight in parameters.values()):
        raise UsageError(f"freeze: {', '.join(patterns)} leave nothing to train; freeze less")
    for weight in frozen.values():
        weight.requires_grad_(False)
    return list(frozen)
