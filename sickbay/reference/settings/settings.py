"""A run's settings: three dataclasses as the tables of one TOML file, and what overrules what.

    text = ["book.txt"]
    preset = "small"

    [model]
    dim = 256

    [recipe]
    steps = 5000
    clip = "none"

    [data]
    tokenizer = "bpe"

A flag overrules the file, the file its preset, the preset the default. Every run's folder holds such a file with all of its settings.
"""

from __future__ import annotations

import dataclasses
import difflib
import functools
import json
import re
import sys
import types
import typing
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

from sickbay.core.errors import UsageError
from sickbay.reference.models.config import Config
from sickbay.reference.settings.data_settings import DataSettings
from sickbay.reference.settings.presets import PRESETS
from sickbay.reference.settings.recipe import Recipe

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

FILE = "config.toml"
TABLES: dict[str, Any] = {"model": Config, "recipe": Recipe, "data": DataSettings}
TOP = ("text", "preset")
NONE = "none"  # what TOML has no word for

Tables = dict[str, dict[str, Any]]


@dataclasses.dataclass(frozen=True)
class Settings:
    """All of a run's settings, checked. `texts`: what it trains on."""

    model: Config
    recipe: Recipe
    data: DataSettings
    texts: tuple[str, ...] = ()


@dataclasses.dataclass(frozen=True)
class Kind:
    """What a field may hold: `base` is bool, int, float or str, one of `choices` if there are any, or None if `optional`."""

    base: type
    optional: bool
    choices: tuple[str, ...]


@functools.cache
def fields_of(table: str) -> dict[str, Kind]:
    """The settings of `table` by name, in the order of its dataclass."""
    hints = typing.get_type_hints(TABLES[table])
    return {field.name: _kind(hints[field.name]) for field in dataclasses.fields(TABLES[table])}


def meanings(table: str) -> dict[str, str]:
    """What each setting of `table` means: its line in the dataclass's docstring."""
    found = re.findall(r"^\s*`(\w+)`: (.*?)(?=^\s*`\w+`: |\Z)", TABLES[table].__doc__ or "", re.MULTILINE | re.DOTALL)
    return {name: " ".join(meaning.split()).rstrip(".") for name, meaning in found}


def read(path: Path) -> tuple[Tables, tuple[str, ...], str | None]:
    """(tables, texts, preset) of the TOML file at `path`. Raises UsageError naming file and setting."""
    try:
        found = tomllib.loads(path.read_text(encoding="utf-8"))
    except OSError as problem:
        raise UsageError(f"{path} cannot be read: {problem.strerror}; give the path of a TOML file with --config") from problem
    except UnicodeDecodeError as problem:
        raise UsageError(f"{path} is not UTF-8 text (byte {problem.start}); save it as UTF-8") from problem
    except tomllib.TOMLDecodeError as problem:
        raise UsageError(f"{path} is not TOML: {problem}") from problem
    tables: Tables = {}
    for name, value in found.items():
        if name in TOP:
            continue
        if name not in TABLES:
            raise UsageError(f"{path} has no use for {name!r}{_instead(name)}; it holds {', '.join(TOP)}, [{'], ['.join(TABLES)}]")
        if not isinstance(value, dict):
            raise UsageError(f"{path}: {name} is {value!r}; it must be a table: [{name}]")
        tables[name] = {field: converted(name, field, given, f"{path}: ") for field, given in value.items()}
    texts = found.get("text", [])
    texts = [texts] if isinstance(texts, str) else texts
    if not isinstance(texts, list) or not all(isinstance(text, str) for text in texts):
        raise UsageError(f"{path}: text is {texts!r}; it must be a path or a list of paths")
    return tables, tuple(texts), preset_named(found.get("preset"), f"{path}: ")


def write(settings: Settings, path: Path) -> None:
    """`path` holds all of `settings` as TOML, each with its meaning. Raises OSError."""
    lines = ["# All settings of this run. Again: sickbay train --config THIS_FILE", f"text = {_toml(list(settings.texts))}"]
    for table in TABLES:
        held, told = dataclasses.asdict(getattr(settings, table)), meanings(table)
        assignments = {field: f"{field} = {_toml(value)}" for field, value in held.items()}
        width = max(map(len, assignments.values()))
        lines += ["", f"[{table}]", *(f"{each:<{width}}  # {told[field]}" for field, each in assignments.items())]
    partial = path.with_name(path.name + ".partial")
    partial.write_text("\n".join(lines) + "\n", encoding="utf-8")
    partial.replace(path)


def preset_named(name: object, where: str = "") -> str | None:
    """`name`, which stands in PRESETS, or None. Raises UsageError."""
    if name is not None and name not in PRESETS:
        raise UsageError(f"{where}preset is {name!r}; it must be one of {', '.join(PRESETS)}")
    return None if name is None else str(name)


def layered(*layers: Mapping[str, Mapping[str, Any]]) -> Tables:
    """The tables of all `layers` as one; a later layer overrules an earlier one."""
    return {table: {field: value for layer in layers for field, value in layer.get(table, {}).items()} for table in TABLES}


def checked(tables: Tables, texts: tuple[str, ...]) -> Settings:
    """The settings that `tables` give, defaults for the rest. Raises ValueError naming the field, its value and its range."""
    model, recipe, texts_into = (TABLES[table](**tables.get(table, {})) for table in TABLES)
    return Settings(model, recipe, texts_into, texts)


def converted(table: str, field: str, value: object, where: str = "") -> Any:
    """`value` as `field` of `table` holds it: "none" as None, 1 as 1.0, 2e3 as 2000. Raises UsageError where there is no such field."""
    fields = fields_of(table)
    if field not in fields:
        raise UsageError(f"{where}[{table}] has no setting {field!r}{_instead(field)}")
    kind = fields[field]
    if value == NONE and kind.optional:
        return None
    if kind.base is float and isinstance(value, int) and not isinstance(value, bool):
        return float(value)
    if kind.base is int and isinstance(value, float) and value.is_integer():
        return int(value)
    return value


def _instead(name: str) -> str:
    """What was probably meant by `name`."""
    places = {field: table for table in TABLES for field in fields_of(table)}
    if name in places:
        return f": it belongs in [{places[name]}]"
    near = difflib.get_close_matches(name, [*places, *TABLES, *TOP], n=1)
    if not near:
        return ""
    return f"; did you mean {near[0]}" + (f" in [{places[near[0]]}]?" if near[0] in places else "?")


def _kind(hint: Any) -> Kind:
    parts = typing.get_args(hint) if typing.get_origin(hint) in (typing.Union, types.UnionType) else (hint,)
    optional = type(None) in parts
    (base,) = (part for part in parts if part is not type(None))
    if typing.get_origin(base) is Literal:
        return Kind(str, optional, typing.get_args(base))
    return Kind(base, optional, ())


def _toml(value: object) -> str:
    if value is None:
        return json.dumps(NONE)
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, str):
        # JSON's strings are TOML's, but for the one control character that JSON leaves as it is.
        return json.dumps(value, ensure_ascii=False).replace("\x7f", "\\u007F")
    if isinstance(value, (list, tuple)):
        return f"[{', '.join(map(_toml, value))}]"
    return repr(value)
