"""Where text comes from: files, folders of them, JSONL, TSV and stdin, read in pieces so that no text needs to fit in memory."""

from __future__ import annotations

import codecs
import hashlib
import json
import shutil
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from sickbay.core.errors import UsageError

CHUNK = 1 << 20  # bytes read at a time
STDIN = Path("-")
JSONL_SUFFIXES = (".jsonl", ".ndjson")
TSV_SUFFIX = ".tsv"
FOLDER_SUFFIXES = (".txt", ".text", ".md", *JSONL_SUFFIXES)  # what is taken from a folder
PAIR_SUFFIXES = (*JSONL_SUFFIXES, TSV_SUFFIX)  # what pairs are read from

Report = Callable[[int], None]


def nobody(count: int) -> None:
    """The report of bytes read to nobody."""


@dataclass(frozen=True)
class Document:
    """One text. `place`: where it stands, for messages. `chunks`: its text in pieces, to be read once and before the next document."""

    place: str
    chunks: Iterator[str]


@dataclass(frozen=True)
class Text:
    """`files` in the order they are read. `field`: of a JSONL row, holds its text. `several`: documents, not one running text.

    `pair`: the fields of source and target where the rows are pairs; each of their two texts is then a document.
    """

    files: tuple[Path, ...]
    field: str = "text"
    several: bool = False
    pair: tuple[str, str] | None = None

    @classmethod
    def at(cls, places: Sequence[Path], field: str = "text", pair: tuple[str, str] | None = None) -> Text:
        """The text files and JSONL files that `places` are or, for folders, hold at any depth, by name. Raises UsageError."""
        files: list[Path] = []
        for place in places:
            files += _files_below(place, FOLDER_SUFFIXES if pair is None else PAIR_SUFFIXES) if place.is_dir() else [place]
        for file in files:
            if not file.is_file():
                raise UsageError(f"no text file at {file}; give a UTF-8 text, a JSONL file, a folder of them, or - for stdin")
            if pair is not None and file.suffix not in PAIR_SUFFIXES:
                raise UsageError(f"{file} holds no pairs: they are read from files that end in {', '.join(PAIR_SUFFIXES)}")
        several = pair is not None or len(files) > 1 or any(file.suffix in JSONL_SUFFIXES for file in files)
        return cls(tuple(files), field, several, pair)

    def size(self) -> int:
        """Bytes of all files."""
        return sum(file.stat().st_size for file in self.files)

    def fingerprint(self, report: Report = nobody) -> str:
        """sha256 in hex of what is read: for one text file, of its bytes."""
        if not self.several:
            return fingerprint(self.files[0], report)
        rows = self.field if self.pair is None else json.dumps(self.pair)
        parts = [rows] + [f"{file.suffix in JSONL_SUFFIXES} {fingerprint(file, report)}" for file in self.files]
        return hashlib.sha256("\n".join(parts).encode()).hexdigest()

    def documents(self, report: Report = nobody) -> Iterator[Document]:
        """Each document, in order; `report` is told the bytes read. Raises UsageError naming file and byte, or file and line; OSError."""
        for file in self.files:
            if self.pair is not None:
                yield from _sides(file, self.pair, report)
            elif file.suffix in JSONL_SUFFIXES:
                yield from _rows(file, self.field, report)
            else:
                yield Document(str(file), _decoded(file, report))

    def chunks(self, report: Report = nobody) -> Iterator[str]:
        """The text of all documents in pieces, a line end after each of several."""
        for document in self.documents(report):
            yield from document.chunks
            if self.several:
                yield "\n"


def spool(target: Path) -> Path:
    """`target` holds the bytes of stdin, which can be read only once. Raises UsageError where stdin is a terminal; OSError."""
    if sys.stdin.isatty():
        raise UsageError("- reads the text from stdin, which is a terminal; pipe a text into it: `cat *.txt | sickbay train -`")
    with target.open("wb") as file:
        shutil.copyfileobj(sys.stdin.buffer, file, CHUNK)
    return target


def fingerprint(path: Path, report: Report = nobody) -> str:
    """sha256 of the file's bytes, in hex."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while chunk := file.read(CHUNK):
            digest.update(chunk)
            report(len(chunk))
    return digest.hexdigest()


def shipped_text() -> Path:
    """The path of the shipped Tiny Shakespeare. Raises FileNotFoundError where it was not installed."""
    here = Path(__file__).resolve().parents[1]
    places = (here / "tinyshakespeare.txt", here.parents[1] / "examples" / "data" / "tinyshakespeare.txt")
    for place in places:
        if place.is_file():
            return place
    raise FileNotFoundError(f"tinyshakespeare.txt is neither at {places[0]} nor at {places[1]}")


def _files_below(folder: Path, suffixes: Sequence[str]) -> list[Path]:
    found = sorted(
        path
        for path in folder.rglob("*")
        if path.suffix in suffixes and path.is_file() and not any(part.startswith(".") for part in path.relative_to(folder).parts)
    )
    if not found:
        raise UsageError(f"no text file at {folder}: the folder holds none that ends in {', '.join(suffixes)}; name the files themselves")
    return found


def _decoded(file: Path, report: Report) -> Iterator[str]:
    """The UTF-8 file's text, line ends as they stand."""
    decoder = codecs.getincrementaldecoder("utf-8")()
    read = 0
    with file.open("rb") as handle:
        while chunk := handle.read(CHUNK):
            held = len(decoder.getstate()[0])  # the beginning of a character that the last chunk cut
            try:
                text = decoder.decode(chunk, final=len(chunk) < CHUNK and not handle.peek(1))
            except UnicodeDecodeError as problem:
                byte = read - held + problem.start
                raise UsageError(f"{file} is not UTF-8 text (byte {byte:,}); convert it first, e.g. with iconv") from problem
            read += len(chunk)
            report(len(chunk))
            yield text


def _rows(file: Path, field: str, report: Report) -> Iterator[Document]:
    """The rows of a JSONL file; empty lines and empty texts are passed over."""
    with file.open("rb") as handle:
        for number, line in enumerate(handle, 1):
            report(len(line))
            if not line.isspace() and (text := _text_of(_row(line, field, f"{file}:{number}"), field, f"{file}:{number}")):
                yield Document(f"{file}:{number}", iter((text,)))


def _sides(file: Path, pair: tuple[str, str], report: Report) -> Iterator[Document]:
    """Source and target of each row of a JSONL or TSV file, in turn; empty lines are passed over, an empty side is refused."""
    with file.open("rb") as handle:
        for number, line in enumerate(handle, 1):
            report(len(line))
            if line.isspace():
                continue
            place = f"{file}:{number}"
            if file.suffix == TSV_SUFFIX:
                sides = _line(line, place).rstrip("\r\n").split("\t")
                if len(sides) != 2:
                    raise UsageError(f"{place} has {len(sides) - 1} tabs; each line must be a source, one tab and its target")
            else:
                row = _row(line, pair[0], place)
                sides = [_text_of(row, field, place, flag) for field, flag in zip(pair, ("--source-field", "--target-field"))]
            if not all(sides):
                raise UsageError(f"{place} has an empty {'target' if sides[0] else 'source'}; a pair has two texts")
            yield from (Document(place, iter((side,))) for side in sides)


def _line(line: bytes, place: str) -> str:
    try:
        return line.decode("utf-8")
    except UnicodeDecodeError as problem:
        raise UsageError(f"{place} is not UTF-8 text (byte {problem.start} of the line); convert it first, e.g. with iconv") from problem


def _row(line: bytes, field: str, place: str) -> dict[str, object]:
    """The JSON object on `line`. `field`: one that it should have, for messages."""
    try:
        row = json.loads(_line(line, place))
    except json.JSONDecodeError as problem:
        raise UsageError(f"{place} is not JSON: {problem.msg} at character {problem.pos}; each line must be one JSON object") from problem
    except RecursionError as problem:
        raise UsageError(f"{place} is not readable JSON: nested too deeply") from problem
    if not isinstance(row, dict):
        raise UsageError(f'{place} is {type(row).__name__}, not an object; each line must be like {{{json.dumps(field)}: "..."}}')
    return row


def _text_of(row: dict[str, object], field: str, place: str, flag: str = "--field") -> str:
    if field not in row:
        there = ", ".join(sorted(row)[:8]) or "none"
        raise UsageError(f"{place} has no field {field!r} (it has: {there}); name the one that holds the text with {flag}")
    text = row[field]
    if not isinstance(text, str):
        raise UsageError(f"{place}: the field {field!r} is {type(text).__name__}, not text; name the one that holds the text with {flag}")
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as problem:
        raise UsageError(f"{place}: the field {field!r} holds half of a surrogate pair (character {problem.start}), no text") from problem
    return text
