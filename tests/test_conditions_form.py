"""Every condition has the common form: text under five headings, sourced numbers, known signals, cures that exist, no cycle, no torch."""

from __future__ import annotations

import ast
import importlib
import inspect
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest

import sickbay.conditions
from sickbay.core.condition import CHAPTERS, HEADINGS, Condition, reachable
from sickbay.core.diagnosis import Threshold
from sickbay.core.signals import SIGNALS
from sickbay.registry import conditions, treatments

ALL = list(conditions().values())
LONGEST_DIAGNOSE = 26  # lines of body: a Diagnosis of eight fields and a short rule
SHORTEST_SECTION = 30  # characters
CATALOGUE_OF_THE_NAN_CHAPTER = {
    *("exploding-gradients", "learning-rate-too-high", "missing-normalization", "softmax-overflow", "attention-scale"),
    *("gradients-not-zeroed", "non-finite-input", "non-finite-weights", "division-by-zero", "log-of-zero"),
    *("half-precision-overflow", "scaler-collapse", "clip-before-unscale", "missing-targets", "loss-spike", "attention-logit-growth"),
}

SEVERAL_RANKS = {"rank-desync", "rank-duplicate-data"}  # the reference trains in one process: scripts of tests/zoo have these faults

every_condition = pytest.mark.parametrize("condition", ALL, ids=[condition.id for condition in ALL])


def module_of(condition: Condition) -> ModuleType:
    return importlib.import_module(f"sickbay.conditions.{condition.chapter}.{condition.id.replace('-', '_')}")


def sections(doc: str) -> dict[str, str]:
    """The text under each heading."""
    found: dict[str, list[str]] = {}
    heading = ""
    for line in doc.splitlines():
        if line in HEADINGS:
            heading = line
        found.setdefault(heading, []).append(line)
    return {name: "\n".join(lines[1:]).strip() for name, lines in found.items() if name}


def test_the_nan_chapter_is_complete() -> None:
    assert {condition.id for condition in ALL if condition.chapter == "nan"} == CATALOGUE_OF_THE_NAN_CHAPTER


@every_condition
def test_the_text_has_the_five_headings_in_order_and_something_under_each(condition: Condition) -> None:
    opening = condition.doc.splitlines()[0]
    assert opening.endswith("."), "the first line is a sentence"
    assert condition.chapter in CHAPTERS
    parts = sections(condition.doc)
    assert list(parts) == list(HEADINGS)
    for heading, text in parts.items():
        assert len(text) >= SHORTEST_SECTION, f"{heading} says nothing"


@every_condition
def test_the_symptom_is_one_short_phrase(condition: Condition) -> None:
    assert 15 <= len(condition.symptom) <= 120
    assert not condition.symptom.endswith(".")
    assert "\n" not in condition.symptom


@every_condition
def test_every_number_of_the_module_is_sourced_or_counted(condition: Condition) -> None:
    """A float at module level must be a Threshold with unit and source; a bare int or tuple of ints is a count with a remark behind it."""
    module = module_of(condition)
    lines = inspect.getsource(module).splitlines()
    for node in ast.parse("\n".join(lines)).body:
        if not isinstance(node, ast.Assign):
            continue
        for target in node.targets:
            names = [leaf.id for leaf in ast.walk(target) if isinstance(leaf, ast.Name)]
            for name in names:
                value = getattr(module, name)
                for number in value.values() if isinstance(value, dict) else [value]:
                    if isinstance(number, float):
                        assert isinstance(number, Threshold), f"{name} is a bare number"
                        assert number.unit
                        assert len(number.source) > 10, f"{name} has no source"
                    elif isinstance(number, int) and not isinstance(number, bool):
                        text = "\n".join(lines[max(0, node.lineno - 2) : node.end_lineno])
                        assert "#" in text or "FEWEST" in name, f"{name} has no unit"


@every_condition
def test_signals_are_known_and_asked_for_once(condition: Condition) -> None:
    asked = (*condition.needs, *condition.uses)
    source = inspect.getsource(module_of(condition))
    assert condition.needs or "return NotExamined" in source or "else NotExamined" in source, "it would be healthy unobserved"
    assert set(asked) <= set(SIGNALS)
    assert len(set(asked)) == len(asked)
    assert [signal for signal in asked if f'"{signal}"' not in source.split("condition = Condition")[0]] == [], "declared and never read"


@every_condition
def test_cures_and_consequences_exist(condition: Condition) -> None:
    assert condition.prescribes
    assert [name for name in condition.prescribes if name not in treatments()] == []
    assert [name for name in condition.leads_to if name not in conditions()] == []
    assert condition.id not in reachable(condition.id, conditions()), "it leads to itself"


@every_condition
def test_the_fault_can_be_planted(condition: Condition) -> None:
    if condition.id in SEVERAL_RANKS:
        assert condition.inject is None
        return
    assert condition.inject is not None
    assert list(inspect.signature(condition.inject).parameters) == ["case"]
    assert condition.inject.__doc__, "what is planted is said in a sentence"


@every_condition
def test_diagnose_is_short_and_imports_only_core(condition: Condition) -> None:
    tree = ast.parse(inspect.getsource(module_of(condition)))
    (function,) = [node for node in tree.body if isinstance(node, ast.FunctionDef) and node.name == "diagnose"]
    first = function.body[1] if ast.get_docstring(function) else function.body[0]
    assert function.end_lineno is not None
    assert function.end_lineno - first.lineno + 1 <= LONGEST_DIAGNOSE
    imported = [node.module or "" for node in tree.body if isinstance(node, ast.ImportFrom)]
    assert [name for name in imported if name.startswith("sickbay") and not name.startswith("sickbay.core")] == []


@pytest.mark.parametrize("treatment", list(treatments().values()), ids=list(treatments()))
def test_every_treatment_says_what_it_does(treatment: object) -> None:
    safety, apply = getattr(treatment, "safety", ""), getattr(treatment, "apply", None)
    assert safety in ("safe", "changes-training", "advice")
    assert (apply is None) == (safety == "advice"), "advice acts by hand, the others by themselves"
    assert getattr(treatment, "summary", "").endswith(".")
    assert len(getattr(treatment, "doc", "")) > SHORTEST_SECTION


def test_a_treatment_is_named_after_its_file() -> None:
    folder = Path(str(sickbay.conditions.__file__)).parent.parent / "treatments"
    assert {path.stem.replace("_", "-") for path in folder.glob("*.py") if path.stem != "__init__"} == set(treatments())


def test_the_catalogue_loads_without_torch() -> None:
    code = (
        "import sys\n"
        "class Block:\n"
        "    def find_spec(self, name, path=None, target=None):\n"
        "        if name.split('.')[0] in ('torch', 'transformers'): raise ImportError(name + ' is blocked')\n"
        "sys.meta_path.insert(0, Block())\n"
        "from sickbay.registry import conditions, treatments\n"
        "print(len(conditions()), len(treatments()))\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == [str(len(ALL)), str(len(treatments()))]
