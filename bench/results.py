"""RESULTS.md: each program writes its own section, with the conditions under which it measured."""

from __future__ import annotations

import os
import platform
import time
from pathlib import Path

RESULTS = Path(__file__).with_name("RESULTS.md")


def conditions() -> str:
    """Where and when this was measured, and how busy the machine was, in a sentence."""
    import torch

    cpu = next((line.partition(":")[2].strip() for line in _lines("/proc/cpuinfo") if line.startswith("model name")), platform.machine())
    gpu = f", {torch.cuda.get_device_name()}" if torch.cuda.is_available() else ""
    load = ", ".join(f"{value:.1f}" for value in os.getloadavg())
    return (
        f"Measured {time.strftime('%Y-%m-%d')} on {cpu}, {os.cpu_count()} cores{gpu}, Python {platform.python_version()}, "
        f"torch {torch.__version__}, {torch.get_num_threads()} thread(s); load averages at the end {load}."
    )


def put(section: str, text: str) -> None:
    """Section `section` of RESULTS.md holds `text`; the others are as they were."""
    begin, end = f"<!-- {section} -->\n", f"<!-- /{section} -->\n"
    known = RESULTS.read_text(encoding="utf-8") if RESULTS.exists() else "# Results\n"
    before, found, rest = known.partition(begin)
    after = rest.partition(end)[2] if found else ""
    RESULTS.write_text(f"{before if found else known.rstrip() + chr(10) * 2}{begin}{text.rstrip()}\n{end}{after}", encoding="utf-8")


def table(heading: list[str], rows: list[list[str]]) -> str:
    """A Markdown table."""
    return "\n".join("| " + " | ".join(row) + " |" for row in [heading, ["---"] * len(heading), *rows])


def _lines(path: str) -> list[str]:
    try:
        return Path(path).read_text(encoding="utf-8").splitlines()
    except OSError:
        return []
