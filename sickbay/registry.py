"""Finds the things in the four rooms by walking their folders: adding a file is all it takes to add one."""

from __future__ import annotations

import dataclasses
import functools
import importlib
import inspect
import pkgutil
from collections.abc import Iterable
from pathlib import Path
from types import ModuleType

import sickbay.conditions
import sickbay.treatments
from sickbay.core.condition import CHAPTERS, HEADINGS, Condition, checkup
from sickbay.core.diagnosis import Checkup, Diagnosis
from sickbay.core.errors import MalformedCondition, UsageError
from sickbay.core.reader import load_chart
from sickbay.core.treatment import Treatment


@functools.cache
def conditions() -> dict[str, Condition]:
    """All conditions by id, chapters in the guide's order. Raises MalformedCondition naming the file."""
    found: dict[str, Condition] = {}
    for module in _modules(sickbay.conditions):
        _, _, chapter, stem = module.__name__.split(".")
        value = getattr(module, "condition", None)
        doc = inspect.cleandoc(module.__doc__ or "")
        if not isinstance(value, Condition):
            raise MalformedCondition(f"{module.__file__}:1: no `condition = Condition(...)` at the foot")
        if value.id != stem.replace("_", "-"):
            raise MalformedCondition(f"{module.__file__}:1: id {value.id!r} must be the file's name, {stem.replace('_', '-')!r}")
        missing = [heading for heading in HEADINGS if f"\n{heading}\n" not in doc]
        if missing:
            raise MalformedCondition(f"{module.__file__}:1: docstring lacks the heading(s) {', '.join(missing)}")
        found[value.id] = dataclasses.replace(value, chapter=chapter, doc=doc)
    return dict(sorted(found.items(), key=lambda item: (CHAPTERS.index(item[1].chapter), item[0])))


@functools.cache
def treatments() -> dict[str, Treatment]:
    """All treatments by id."""
    found: dict[str, Treatment] = {}
    for module in _modules(sickbay.treatments):
        value = getattr(module, "treatment", None)
        if not isinstance(value, Treatment):
            raise MalformedCondition(f"{module.__file__}:1: no `treatment = Treatment(...)` at the foot")
        found[value.id] = dataclasses.replace(value, doc=inspect.cleandoc(module.__doc__ or ""))
    return found


def chosen(select: Iterable[str] = (), ignore: Iterable[str] = ()) -> list[Condition]:
    """The conditions named by `select` (ids or chapters; empty = all) less those named by `ignore`. Raises UsageError for unknown names."""
    everything = conditions()
    select, ignore = list(select), list(ignore)
    for name in (*select, *ignore):
        check_name(name)
    return [c for c in everything.values() if (not select or {c.id, c.chapter} & set(select)) and not {c.id, c.chapter} & set(ignore)]


def check_name(name: str) -> None:
    """Raises UsageError with the nearest names unless `name` is a condition's id or a chapter."""
    import difflib

    names = [*conditions(), *CHAPTERS]
    if name not in names:
        near = difflib.get_close_matches(name, names, n=3, cutoff=0.5)
        hint = f"did you mean {' or '.join(near)}?" if near else "`sickbay list` shows them all"
        raise UsageError(f"unknown condition or chapter {name!r}: {hint}")


def treatment_for(diagnosis: Diagnosis) -> Treatment | None:
    """The treatment prescribed for `diagnosis`; None if there is none."""
    return treatments().get(diagnosis.prescribes)


def _modules(package: ModuleType) -> list[ModuleType]:
    names = sorted(info.name for info in pkgutil.walk_packages(package.__path__, package.__name__ + ".") if not info.ispkg)
    return [importlib.import_module(name) for name in names]


def explain(id_: str) -> str:
    """The text of condition `id_`, under its five headings. Raises UsageError with the nearest names."""
    found = conditions().get(id_)
    if found is None:
        check_name(id_)
        raise UsageError(f"{id_!r} is a chapter: `sickbay list` shows its conditions")
    return found.doc


def diagnose(folder: str | Path, select: Iterable[str] = (), ignore: Iterable[str] = ()) -> Checkup:
    """The checkup over the run recorded in `folder`, without torch. Raises RecordError when there is no readable record."""
    return checkup(load_chart(folder), chosen(select, ignore))
