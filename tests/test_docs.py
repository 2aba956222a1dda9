"""What the docs say of the catalogue is today's; their links lead somewhere; the commands and examples they name are there and behave."""

from __future__ import annotations

import importlib.util
import re
from pathlib import Path
from types import ModuleType

import pytest
from running import ROOT, report, run, sickbay

from sickbay.cli.main import commands
from sickbay.registry import conditions

DOCS = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md")), *sorted((ROOT / "bench").glob("*.md"))]
STALE = "run: python docs/generate.py"


@pytest.fixture(scope="module")
def generate() -> ModuleType:
    specification = importlib.util.spec_from_file_location("generate", ROOT / "docs" / "generate.py")
    assert specification is not None
    assert specification.loader is not None
    module = importlib.util.module_from_spec(specification)
    specification.loader.exec_module(module)
    return module


def test_the_condition_pages_are_fresh(generate: ModuleType) -> None:
    here = {path.name: path.read_text(encoding="utf-8") for path in (ROOT / "docs" / "conditions").glob("*.md")}
    assert sorted(here) == sorted(["index.md", *(f"{id_}.md" for id_ in conditions())]), STALE
    assert [name for name, text in generate.pages().items() if here[name] != text] == [], STALE


def test_the_readme_lists_every_condition(generate: ModuleType) -> None:
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    assert generate.readme(text) == text, STALE
    assert all(f"[{id_}](" in text for id_ in conditions())


def test_a_readme_without_its_marks_is_refused(generate: ModuleType) -> None:
    with pytest.raises(ValueError, match="lacks"):
        generate.readme("# no table here\n")


@pytest.mark.parametrize("path", DOCS, ids=[str(path.relative_to(ROOT)) for path in DOCS])
def test_links_lead_somewhere(path: Path) -> None:
    links = re.findall(r"\]\(([^)#\s]+)\)", path.read_text(encoding="utf-8"))
    broken = [link for link in links if "://" not in link and not (path.parent / link).exists()]
    assert broken == []


def test_the_readme_begins_with_its_two_commands_and_names_every_other() -> None:
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    first = text.split("```")[1].split("\n")[1:3]
    assert [line.split("#")[0].strip() for line in first] == ["make demo", "make test"]
    assert [name for name in commands() if f"sickbay {name}" not in text] == []


@pytest.mark.parametrize(
    ("name", "condition", "line"),
    [("healthy", None, ""), ("too_good", "causal-leak", ""), ("turns_nan", "division-by-zero", "questions.sum()")],
)
def test_the_examples_are_what_they_are_said_to_be(name: str, condition: str | None, line: str, tmp_path: Path) -> None:
    """For `turns_nan` the README's card holds: same condition, same line of the script."""
    script = ROOT / "examples" / f"{name}.py"
    assert "import sickbay" not in script.read_text(encoding="utf-8")
    outcome = run(sickbay("run", "--max-steps", "30", "--out", str(tmp_path / "run"), str(script)), tmp_path)
    assert outcome.code == 0, outcome.stderr.decode()
    found = report(tmp_path)
    assert found["verdict"] == ("sick" if condition else "healthy")
    alarms = [diagnosis["condition"] for diagnosis in found["diagnoses"] if diagnosis["severity"] != "note"]
    assert alarms[:1] == ([condition] if condition else [])
    if line:
        number = int(found["diagnoses"][0]["source"].rpartition(":")[2])
        assert line in script.read_text(encoding="utf-8").splitlines()[number - 1]
        card = (ROOT / "README.md").read_text(encoding="utf-8")
        assert f"{condition}  critical  step {found['diagnoses'][0]['step']}  (examples/{name}.py:{number})" in card
