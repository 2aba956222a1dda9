"""What docs/reference.md quotes stands in the files it names, and the files it names are there."""

from __future__ import annotations

import re
import textwrap
from pathlib import Path

from running import ROOT

PAGE = ROOT / "docs" / "reference.md"
REFERENCE = ROOT / "sickbay" / "reference"


def quotations(page: str) -> list[tuple[str, str]]:
    """(file, lines) of every block of code."""
    return re.findall(r"^```python(?: (\S+))?\n(.*?)^```$", page, flags=re.MULTILINE | re.DOTALL)


def stands_in(quotation: str, file: Path) -> bool:
    """Whether the lines stand there one after another, whatever their common indentation."""
    sought = textwrap.dedent(quotation).splitlines()
    lines = file.read_text(encoding="utf-8").splitlines()
    return any(textwrap.dedent("\n".join(lines[n : n + len(sought)])).splitlines() == sought for n in range(len(lines)))


def test_every_quotation_stands_in_its_file() -> None:
    found = quotations(PAGE.read_text(encoding="utf-8"))
    assert len(found) > 10
    stale = [f"{file}:\n{lines}" for file, lines in found if not file or not stands_in(lines, ROOT / file)]
    assert stale == [], "docs/reference.md quotes what the files no longer say"


def test_a_stale_quotation_is_seen() -> None:
    ((file, lines),) = quotations("```python sickbay/reference/models/config.py\n    dim: int = 129\n```\n")
    assert not stands_in(lines, ROOT / file)
    assert stands_in("dim: int = 128\nnum_layers: int = 4\n", ROOT / file)


def test_every_file_in_the_table_is_there() -> None:
    rows = [line for line in PAGE.read_text(encoding="utf-8").splitlines() if line.startswith("| ")]
    names = re.findall(r"`([a-z_0-9/]+(?:\.py|/))`", "\n".join(rows))
    assert len(names) > 12
    assert [name for name in names if not (REFERENCE / name).exists()] == []


def test_what_the_page_says_of_a_refusal_is_what_is_said() -> None:
    from sickbay.reference.models.config import Config

    try:
        Config(dim=128, num_heads=3)
    except ValueError as refusal:
        assert f"`{refusal}`" in PAGE.read_text(encoding="utf-8")
    else:
        raise AssertionError("three heads were not refused")
