"""A condition's docstring as blocks that a page can set: headings, paragraphs, lists and code."""

from __future__ import annotations

import re
import textwrap
from dataclasses import dataclass, field
from typing import Literal

from markupsafe import Markup, escape

from sickbay.core.condition import HEADINGS

_SPANS = re.compile(r"``?(?P<code>[^`\n]+)``?|(?P<url>https?://[^\s<>\"')\]]*[^\s<>\"')\].,;:])")
_RULE = re.compile(r"[-=~]{3,}")
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
    for heading, body in _sections(doc):
        if heading:
            found.append(Block("heading", escape(heading)))
        found += [_block(chunk.split("\n")) for chunk in _chunks(body)]
    return found


def _block(lines: list[str]) -> Block:
    if lines[0].startswith("```") or all(line.startswith("    ") for line in lines):
        code = "\n".join(line for line in lines if not line.startswith("```"))
        return Block("code", escape(textwrap.dedent(code)))
    if _ITEM.match(lines[0]):
        return Block("list", Markup(), [inline(item) for item in _items(lines)])
    return Block("paragraph", inline(" ".join(line.strip() for line in lines)))


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


def _sections(doc: str) -> list[tuple[str, str]]:
    """(heading, body) in order, the first heading empty; bodies lose the indentation that all their lines share."""
    sections: list[tuple[str, list[str]]] = [("", [])]
    for line in doc.split("\n"):
        if line in HEADINGS:
            sections.append((line, []))
        elif not (_RULE.fullmatch(line) and sections[-1][0] and not sections[-1][1]):
            sections[-1][1].append(line)
    return [(heading, textwrap.dedent("\n".join(lines)).strip("\n")) for heading, lines in sections]


def _chunks(body: str) -> list[str]:
    """`body` cut at blank lines and around fences."""
    chunks: list[list[str]] = [[]]
    fenced = False
    for line in body.split("\n"):
        if line.startswith("```"):
            if not fenced:
                chunks.append([])
            chunks[-1].append(line)
            if fenced:
                chunks.append([])
            fenced = not fenced
        elif fenced or line.strip():
            chunks[-1].append(line.rstrip())
        else:
            chunks.append([])
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
