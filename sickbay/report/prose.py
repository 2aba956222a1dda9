"""A condition's docstring as blocks that a page can set: headings, paragraphs, lists and code."""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from typing import Literal

from markupsafe import Markup, escape

from sickbay.core.condition import HEADINGS

_SPANS = re.compile(r"``?(?P<code>[^`\n]+)``?|(?P<url>https?://[^\s<>\"')\]]*[^\s<>\"')\].,;:])")
_ITEM = re.compile(r"\s{0,3}(?:[-*]|\d+\.)\s+")


@dataclass(frozen=True)
class Block:
    """One piece of prose; `items` for a list, `text` for the others."""

    kind: Literal["heading", "paragraph", "list", "code"]
    text: Markup
    items: list[Markup] = field(default_factory=list)


def blocks(doc: str) -> list[Block]:
    """`doc` in blocks: lines of one paragraph joined, indented or fenced stretches kept as code."""
    found: list[Block] = []
    for chunk in _chunks(doc):
        lines = chunk.split("\n")
        if lines[0].startswith("```") or all(line.startswith("    ") for line in lines):
            code = [line for line in lines if not line.startswith("```")]
            margin = min((len(line) - len(line.lstrip()) for line in code if line.strip()), default=0)
            found.append(Block("code", escape("\n".join(line[margin:] for line in code))))
        elif len(lines) == 1 and lines[0] in HEADINGS:
            found.append(Block("heading", escape(lines[0])))
        elif _ITEM.match(lines[0]):
            found.append(Block("list", Markup(), [inline(item) for item in _items(lines)]))
        else:
            found.append(Block("paragraph", inline(" ".join(line.strip() for line in lines))))
    return found


def inline(text: str) -> Markup:
    """`text` escaped, with `code` and addresses marked up."""
    parts: list[str] = []
    end = 0
    for match in _SPANS.finditer(text):
        parts.append(str(escape(text[end : match.start()])))
        if match["code"]:
            parts.append(f"<code>{escape(match['code'])}</code>")
        else:
            parts.append(f'<a href="{escape(match["url"])}" rel="noreferrer noopener">{escape(match["url"])}</a>')
        end = match.end()
    return Markup("".join(parts) + str(escape(text[end:])))


def _chunks(doc: str) -> list[str]:
    """`doc` cut at blank lines, around fences, and around headings with or without a rule beneath them."""
    chunks: list[list[str]] = [[]]
    fenced = False
    for line in doc.split("\n"):
        if line.startswith("```"):
            if not fenced:
                chunks.append([])
            chunks[-1].append(line)
            if fenced:
                chunks.append([])
            fenced = not fenced
        elif fenced:
            chunks[-1].append(line)
        elif line.strip() in HEADINGS and not line.startswith(" "):
            chunks += [[line.strip()], []]
        elif not line.strip() or (set(line.strip()) <= set("-=~") and len(line.strip()) > 3):
            chunks.append([])
        else:
            chunks[-1].append(line.rstrip())
    return ["\n".join(chunk) for chunk in chunks if chunk]


def _items(lines: list[str]) -> list[str]:
    items: list[str] = []
    for line in lines:
        start = _ITEM.match(line)
        if start or not items:
            items.append(line[start.end() :] if start else line)
        else:
            items[-1] += " " + line.strip()
    return items
