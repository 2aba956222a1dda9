"""The settings as flags of a command, generated from the dataclasses that hold them."""

from __future__ import annotations

import argparse
import dataclasses
from collections.abc import Callable
from typing import Any

from sickbay.reference.settings.settings import NONE, TABLES, Kind, Tables, converted, fields_of, meanings

SHORT = {
    "num_layers": "layers",
    "num_heads": "heads",
    "batch_size": "batch",
    "learning_rate": "lr",
    "min_learning_rate": "min-lr",
    "matrix_learning_rate": "matrix-lr",
}
METAVAR = {int: "N", float: "X", str: "WORD"}


def add_flags(parser: argparse.ArgumentParser) -> None:
    """Every setting is a flag of `parser`, underscores as dashes; one that is not given is None in what is parsed."""
    for table, held in TABLES.items():
        group, told = parser.add_argument_group(table), meanings(table)
        defaults = {field.name: field.default for field in dataclasses.fields(held)}
        for field, kind in fields_of(table).items():
            default = NONE if defaults[field] is None else defaults[field]
            names = [f"--{name}" for name in (SHORT.get(field), field.replace("_", "-")) if name]
            meaning = f"{told[field]} ({default})".replace("%", "%%")
            if kind.base is bool:
                group.add_argument(*names, dest=field, action=argparse.BooleanOptionalAction, default=None, help=meaning)
            elif kind.choices:
                group.add_argument(*names, dest=field, choices=kind.choices, help=meaning)
            else:
                group.add_argument(*names, dest=field, type=_reader(kind), metavar=METAVAR[kind.base], help=meaning)


def given(args: argparse.Namespace) -> Tables:
    """The settings that were given as flags. Raises UsageError."""
    return {
        table: {field: converted(table, field, getattr(args, field)) for field in fields_of(table) if getattr(args, field) is not None}
        for table in TABLES
    }


def _reader(kind: Kind) -> Callable[[str], Any]:
    """A word of the command line as the setting's value."""
    wanted = {int: "a whole number", float: "a number", str: "a word"}[kind.base] + (f" or {NONE}" if kind.optional else "")

    def read(word: str) -> Any:
        if kind.optional and word == NONE:
            return NONE
        try:
            return kind.base(word)
        except ValueError:
            raise argparse.ArgumentTypeError(f"{word!r} is not {wanted}") from None

    return read
