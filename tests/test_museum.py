"""The museum's scripts say what they are, and three of them are run: the cause comes first, and the repaired twin is not remarked on.

`python bench/museum.py` runs all of them.
"""

from __future__ import annotations

import re
import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "bench"))
import museum

from sickbay import registry

EXHIBITS = museum.exhibits()
RUN = ("last_cycle_dropped", "noncontiguous_update", "resume_without_schedule")


@pytest.mark.parametrize("exhibit", EXHIBITS, ids=lambda exhibit: exhibit.name)
def test_the_form_of_an_exhibit(exhibit: museum.Exhibit) -> None:
    known = registry.conditions()
    assert exhibit.condition in known, "a line `Condition: id`"
    assert set(exhibit.also) <= set(known) - {exhibit.condition}
    assert exhibit.threads and all(re.match(r"https://\S+$", thread) for thread in exhibit.threads), "a line `Thread: https://...`"
    assert len(exhibit.title) > 30 and len(exhibit.doc.splitlines()) >= 6, "a first line, and what was reported"
    assert exhibit.launcher in ("python", "torchrun")
    assert len(exhibit.functions) in (0, 2)
    code = exhibit.path.read_text(encoding="utf-8").partition(exhibit.doc.splitlines()[-1])[2]
    assert "sickbay" not in code, "the script knows nothing of who watches it"
    assert '"fixed"' in code and "torch.manual_seed(" in code


def test_a_docstring_is_read(tmp_path: Path) -> None:
    script = tmp_path / "twice.py"
    script.write_text('"""It counts twice.\n\nThread: https://a.org/1\nThread: https://b.org/2\nCondition: x\nAlso: y, z\n"""\n', "utf-8")
    exhibit = museum.read(script)
    assert (exhibit.name, exhibit.title, exhibit.condition, exhibit.also) == ("twice", "It counts twice", "x", ("y", "z"))
    assert (exhibit.threads, exhibit.launcher, exhibit.functions) == (("https://a.org/1", "https://b.org/2"), "python", ())
    assert exhibit.case(fixed=True).args == ["fixed"] and exhibit.case(fixed=True).expected == []
    script.write_text("pass\n", encoding="utf-8")
    assert museum.read(script).condition == "" and museum.read(script).title == ""


def test_the_list_of_the_museum_is_fresh() -> None:
    assert (museum.MUSEUM / "README.md").read_text(encoding="utf-8") == museum.readme(), "python bench/museum.py --readme"


@pytest.mark.parametrize("name", RUN)
def test_the_cause_comes_first_and_the_twin_is_well(name: str, tmp_path: Path) -> None:
    exhibit = museum.read(museum.MUSEUM / f"{name}.py")
    sick = museum.run(exhibit, False, tmp_path / "sick")
    assert not sick.problem and sick.first(1) and not sick.alarms, sick
    well = museum.run(exhibit, True, tmp_path / "well")
    assert well.right, well
