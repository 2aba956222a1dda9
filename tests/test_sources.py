"""What holds for every source file."""

from __future__ import annotations

from running import ROOT

LONGEST = 400  # lines


def test_no_file_is_too_long_to_be_read_in_one_go() -> None:
    files = [path for folder in ("sickbay", "bench", "tests", "examples", "docs") for path in (ROOT / folder).rglob("*.py")]
    assert len(files) > 400
    lengths = {str(path.relative_to(ROOT)): len(path.read_text(encoding="utf-8").splitlines()) for path in files}
    assert {name: length for name, length in lengths.items() if length > LONGEST} == {}
