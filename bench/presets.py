"""Every preset of `sickbay train` under `sickbay run` and `sickbay checkup`: nothing critical and no warning is expected.

    python bench/presets.py                  all presets
    python bench/presets.py tiny best --write

The large ones are trained for a few steps with few rows, as the table says; their models are whole. Exits with 1 if anything was found.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import results

# (flags of `sickbay train` beside the preset, what they come to)
SHORTENED = {
    "tiny": (("--steps", "250"), "250 of 2,000 steps"),
    "best": (("--steps", "250"), "250 of 1,150 steps"),
    "encoder": (("--steps", "250"), "250 of 2,000 steps"),
    "seq2seq": (("--steps", "250"), "250 of 2,000 steps"),
    "small": (("--steps", "40", "--batch", "2"), "40 of 5,000 steps of 2 rows, not 64"),
    "base": (("--steps", "20", "--batch", "2"), "20 of 20,000 steps of 2 rows, not 32"),
    "gpt2": (
        ("--steps", "5", "--batch", "1", "--accumulation", "2"),
        "5 of 600,000 steps of 2 x 1 rows, not 40 x 12; as many ids as the text teaches",
    ),
}
VALIDATION = 15_394  # characters at the end of the text: the whole last tenth would take a large model an hour


@dataclass(frozen=True)
class Outcome:
    """What was said of one preset. `found`: critical and warning; `peak`: bytes of the largest process."""

    found: tuple[str, ...]
    notes: tuple[str, ...]
    healthy: int
    unexamined: int
    seconds: float
    peak: float


def trained(name: str, folder: Path) -> Outcome:
    """Of `sickbay run -m sickbay train`."""
    return judged("diagnoses", ("run", "--json", "--out", f"run-{name}", "-m", "sickbay", "train", "train.txt", *options(name)), folder)


def both(name: str, folder: Path) -> tuple[Outcome, Outcome]:
    outcomes = trained(name, folder), examined(name, folder)
    print(" | ".join(row(name, *outcomes)), flush=True)
    return outcomes


def options(name: str) -> tuple[str, ...]:
    return ("--val", "val.txt", "--preset", name, "--eval-every", "0", "--json", *SHORTENED[name][0], "--out", f"trained-{name}")


def examined(name: str, folder: Path) -> Outcome:
    """Of `sickbay checkup`."""
    return judged("findings", ("checkup", "--json", f"sickbay.reference.presets:{name}"), folder)


def judged(key: str, words: tuple[str, ...], folder: Path) -> Outcome:
    """What the command's JSON says under `key`. Raises RuntimeError where it gave none."""
    begun, told = time.perf_counter(), folder / f"told-{words[0]}-{words[-1].rpartition(':')[2]}.txt"
    command = [sys.executable, "-m", "sickbay", *words]
    with told.open("w") as errors, subprocess.Popen(command, cwd=folder, stdout=subprocess.PIPE, stderr=errors, text=True) as process:
        assert process.stdout is not None
        said = process.stdout.read()
        _, status, used = os.wait4(process.pid, 0)
        process.returncode = os.waitstatus_to_exitcode(status)
    _, _, content_text = f"\n{said}".rpartition("\n{\n")
    if not content_text:
        raise RuntimeError(f"{' '.join(words)}: {told.read_text()[-2000:]}")
    content = json.loads("{" + content_text)
    names = {each["condition"]: each["severity"] for each in content[key]}
    return Outcome(
        tuple(name for name, severity in names.items() if severity != "note"),
        tuple(name for name, severity in names.items() if severity == "note"),
        len(content["healthy"]),
        len(content["unexamined"]),
        time.perf_counter() - begun,
        used.ru_maxrss * 1024.0,
    )


def row(name: str, of_run: Outcome, of_checkup: Outcome) -> list[str]:
    told = [
        f"{', '.join(each.found) or 'nothing'}{f' ({len(each.notes)} note: ' + ', '.join(each.notes) + ')' if each.notes else ''}"
        for each in (of_run, of_checkup)
    ]
    judgements = [f"{each.healthy} / {each.unexamined}" for each in (of_run, of_checkup)]
    took = [f"{each.seconds:.0f} s, {each.peak / 2**30:.1f} GiB" for each in (of_run, of_checkup)]
    return [name, SHORTENED[name][1], told[0], judgements[0], took[0], told[1], judgements[1], took[1]]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", default=list(SHORTENED), metavar="PRESET")
    parser.add_argument("--jobs", type=int, default=1, metavar="N", help="presets examined at once (1)")
    parser.add_argument("--write", action="store_true", help="put the table into RESULTS.md")
    args = parser.parse_args()
    from sickbay.reference.data.sources import shipped_text

    text = shipped_text().read_text(encoding="utf-8")
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place)
        (folder / "train.txt").write_text(text[:-VALIDATION], encoding="utf-8")
        (folder / "val.txt").write_text(text[-VALIDATION:], encoding="utf-8")
        with ThreadPoolExecutor(args.jobs) as pool:
            # The largest come last in the table and take longest: they are begun first.
            begun = {name: pool.submit(both, name, folder) for name in reversed(args.names)}
            outcomes = {name: begun[name].result() for name in args.names}
    rows = [row(name, *outcomes[name]) for name in args.names]
    found = sum(len(each.found) for pair in outcomes.values() for each in pair)
    heading = ["preset", "trained for", "run: found", "healthy / not examined", "took", "checkup: found", "healthy / not examined", "took"]
    if args.write:
        about = (
            "Every preset under `sickbay run -m sickbay train` and `sickbay checkup sickbay.reference.presets:NAME`; "
            '"nothing" is nothing critical and no warning.'
        )
        section = f"## Presets\n\n{about}\n\n{results.table(heading, rows)}\n\n{results.conditions()} {args.jobs} at once."
        results.put("presets", section)
    return 1 if found else 0


if __name__ == "__main__":
    sys.exit(main())
