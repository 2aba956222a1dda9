"""Writes what the docs say of the catalogue: docs/conditions/ and README's table. Run it after changing a condition's text.

python docs/generate.py
"""

from __future__ import annotations

import textwrap
from itertools import groupby
from pathlib import Path

from sickbay.core.condition import HEADINGS, Condition
from sickbay.core.signals import SIGNALS
from sickbay.registry import conditions, treatments
from sickbay.report.words import CHAPTER_TITLES

HERE = Path(__file__).parent
FOLDER = HERE / "conditions"
README = HERE.parent / "README.md"
BEGIN, END = "<!-- conditions, written by docs/generate.py -->\n", "<!-- end of conditions -->\n"
NOTE = "<!-- written by docs/generate.py from the condition's own file -->\n"


def pages() -> dict[str, str]:
    """The text of every generated file by its name in docs/conditions/."""
    return {"index.md": index(), **{f"{condition.id}.md": page(condition) for condition in conditions().values()}}


def index() -> str:
    parts = [NOTE, "# Conditions\n"]
    for chapter, members in groupby(conditions().values(), key=lambda condition: condition.chapter):
        rows = [f"| [{condition.id}]({condition.id}.md) | {condition.symptom} |" for condition in members]
        parts += [f"## {CHAPTER_TITLES[chapter]}\n", "| condition | what is wrong |\n| --- | --- |", "\n".join(rows) + "\n"]
    return "\n".join(parts)


def page(condition: Condition) -> str:
    parts = [
        NOTE,
        f"# {condition.id}\n",
        f"Chapter: {CHAPTER_TITLES[condition.chapter]}. `sickbay explain {condition.id}` prints this text.\n",
    ]
    for heading, body in sections(condition.doc):
        parts += ([f"## {heading}\n"] if heading else []) + [body + "\n"]
    cures = [treatments()[id_] for id_ in condition.prescribes]
    parts += ["## Prescribed\n", "\n".join(f"- **{cure.id}** ({cure.safety}): {cure.summary}" for cure in cures) + "\n"]
    measured = [SIGNALS[id_] for id_ in (*condition.needs, *condition.uses)]
    parts += ["## Read from\n", "\n".join(f"- `{signal.id}` ({signal.unit}): {signal.meaning}" for signal in measured) + "\n"]
    if condition.leads_to:
        parts += ["## Leads to\n", ", ".join(f"[{id_}]({id_}.md)" for id_ in condition.leads_to) + "\n"]
    return "\n".join(parts)


def readme(text: str) -> str:
    """README's `text` with today's table between its marks. Raises ValueError where a mark is missing."""
    if BEGIN not in text or END not in text:
        raise ValueError(f"README.md lacks {BEGIN.strip()} or {END.strip()}")
    rows = [
        f"| {condition.chapter} | [{condition.id}](docs/conditions/{condition.id}.md) | {condition.symptom} |"
        for condition in conditions().values()
    ]
    table = "\n".join(["| chapter | condition | what is wrong |", "| --- | --- | --- |", *rows])
    return f"{text.partition(BEGIN)[0]}{BEGIN}{table}\n{END}{text.partition(END)[2]}"


def sections(doc: str) -> list[tuple[str, str]]:
    """(heading, body) in order, the opening sentence under an empty heading; bodies lose the indentation their lines share."""
    found: list[tuple[str, list[str]]] = [("", [])]
    for line in doc.splitlines():
        if line in HEADINGS:
            found.append((line, []))
        else:
            found[-1][1].append(line)
    return [(heading, textwrap.dedent("\n".join(lines)).strip("\n")) for heading, lines in found]


def main() -> None:
    """docs/conditions/ holds exactly the pages of today's catalogue, and README its table."""
    README.write_text(readme(README.read_text(encoding="utf-8")), encoding="utf-8")
    FOLDER.mkdir(exist_ok=True)
    written = pages()
    for name, text in written.items():
        (FOLDER / name).write_text(text, encoding="utf-8")
    for path in FOLDER.glob("*.md"):
        if path.name not in written:
            path.unlink()


if __name__ == "__main__":
    main()
