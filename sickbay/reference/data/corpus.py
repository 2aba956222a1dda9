"""A corpus: texts made into tokens once, kept on disk by what they are, and mapped by every run that trains on them.

corpus = prepare([Path("books/")], Path("tokens"), DataSettings(tokenizer="bpe"))
for ids, targets in train_batches(corpus, settings, context=256, batch_size=12, seed=0): ...
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import json
import os
import shutil
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path

from sickbay.core.errors import UsageError
from sickbay.reference.data import sources, tokens
from sickbay.reference.data.augment import Augmentation, append_augmented, warning
from sickbay.reference.data.batches import ALL, Batch, Tokens, random_batches, shuffled_batches, spread_batches
from sickbay.reference.data.pairs import Translation
from sickbay.reference.data.sources import Report, Text
from sickbay.reference.settings.data_settings import DataSettings
from sickbay.reference.text.tokenizer import ByteTokenizer, CharTokenizer, Tokenizer, load

FORMAT = 1


@dataclass(frozen=True)
class Corpus:
    """Texts as tokens on disk, mapped.

    `train`, `val`: ids `(N,)`, of pairs as `pairs.Pairs` reads them. `source`: sha256 of the texts. `bytes_per_token`: mean UTF-8 bytes
    of a validation token, of a text that is cut in two for validation the mean of the whole. `several`: made of documents, each
    followed by the tokenizer's `end_of_text`.
    """

    tokenizer: Tokenizer
    train: Tokens
    val: Tokens
    source: str
    bytes_per_token: float
    several: bool


def prepare(
    places: Path | Sequence[Path],
    folder: Path,
    settings: DataSettings | None = None,
    tokenizer: Tokenizer | None = None,
    *,
    expected: str | None = None,
    context: int = 0,
    pairs: bool = False,
) -> Corpus:
    """The corpus of the texts at `places`, its tokens below `folder`: written once, found again by the same texts and tokenizer.

    `tokenizer`: None = the one `settings` name, made of all the texts where it is made of texts. `expected`: the `source`
    it must have. `context`: positions of a row, for which a text that is too short is refused before it is read.
    `pairs`: the texts are rows of source and target.
    Cut short, it leaves nothing half-done. Raises UsageError for what cannot be read, is too short or another text; OSError.
    """
    settings = settings or DataSettings()
    places = [places] if isinstance(places, Path) else list(places)
    if settings.augments:
        print(f"note: {warning(settings)}", file=sys.stderr)
    existed = folder.is_dir()
    partial = folder / f".partial-{os.getpid()}"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir()
        return _prepared(places, partial, settings, tokenizer, expected, context, pairs)
    except UsageError as problem:
        raise UsageError(str(problem).replace(str(partial / "stdin"), "stdin")) from problem
    finally:
        shutil.rmtree(partial, ignore_errors=True)
        if not existed:
            with contextlib.suppress(OSError):
                folder.rmdir()  # only where nothing was kept


def _prepared(
    places: list[Path],
    partial: Path,
    settings: DataSettings,
    tokenizer: Tokenizer | None,
    expected: str | None,
    context: int,
    pairs: bool,
) -> Corpus:
    """The corpus, new tokens made in the empty folder `partial` and renamed into place when they are whole."""
    folder = partial.parent
    if sources.STDIN in places:
        if tokenizer is not None and expected is not None:
            # A run that goes on needs the tokens alone, and a pipe is gone when it has run.
            tokenizer.save(partial / "tokenizer.json")
            kept = folder / _key(expected, settings, partial / "tokenizer.json")
            if _complete(kept):
                return _opened(kept, tokenizer, expected, pairs)
        places = [sources.spool(partial / "stdin") if place == sources.STDIN else place for place in places]
    text = Text.at(places, settings.field, (settings.source_field, settings.target_field) if pairs else None)
    val = None if settings.val is None else _separate(Path(settings.val), text)
    _demand_size(text, val, settings, context)
    source = _source(text, val)
    if expected is not None and source != expected:
        raise UsageError(f"{_named(places)} is not the text this run was trained on; give that one, or start anew with another --out")
    tokenizer = tokenizer or _made(settings, text, val, source, folder)
    tokenizer.save(partial / "tokenizer.json")
    kept = folder / _key(source, settings, partial / "tokenizer.json")
    if not _complete(kept):
        _write(text, val, tokenizer, settings, partial)
        (partial / "stdin").unlink(missing_ok=True)
        shutil.rmtree(kept, ignore_errors=True)
        # Another process may have been faster: its tokens are the same.
        with contextlib.suppress(OSError):
            partial.rename(kept)
        if not _complete(kept):
            raise OSError(errno.EIO, "not whole although it was written", str(kept))
    return _opened(kept, tokenizer, source, pairs)


def _opened(kept: Path, tokenizer: Tokenizer, source: str, pairs: bool) -> Corpus:
    told = json.loads((kept / "corpus.json").read_text(encoding="utf-8"))
    train_tokens, val_tokens = (tokens.open_tokens(kept / f"{part}.bin", _ids(tokenizer, pairs)) for part in ("train", "val"))
    return Corpus(tokenizer, train_tokens, val_tokens, source, told["bytes_per_token"], told["several"])


def train_batches(
    corpus: Corpus, settings: DataSettings, context: int, batch_size: int, seed: int, first: int = 0, rows: slice = ALL
) -> Iterator[Batch]:
    """Endless training batches from number `first` on, in the order `settings` name; what they are is told in batches.py."""
    stream = shuffled_batches if settings.order == "shuffled" else random_batches
    return stream(corpus.train, context, batch_size, seed, first, rows=rows, end_of_text=packed_by(corpus, settings))


def val_batches(
    corpus: Corpus, settings: DataSettings, context: int, batch_size: int, most_rows: int | None = None, rows: slice = ALL
) -> Iterator[Batch]:
    """The validation batches, each token once, or `most_rows` windows of them evenly spread."""
    return spread_batches(corpus.val, context, batch_size, most_rows, rows=rows, end_of_text=packed_by(corpus, settings))


def packed_by(corpus: Corpus, settings: DataSettings) -> int | None:
    """The id that keeps documents of a row apart, for `packing.documents_of`; None where rows are not packed. Raises UsageError."""
    if not settings.packed:
        return None
    if not corpus.several:
        raise UsageError(
            "packed keeps documents apart, and this text is a single one; give a folder, several files or JSONL, or leave it out"
        )
    if corpus.tokenizer.end_of_text is None:
        raise UsageError("packed needs a tokenizer with an id that ends a document; --tokenizer bytes and bpe have one")
    return corpus.tokenizer.end_of_text


def _separate(place: Path, train: Text) -> Text:
    """The text at `place`, none of its files also in `train`."""
    text = Text.at([place], train.field, train.pair)
    both = {file.resolve() for file in text.files} & {file.resolve() for file in train.files}
    if both:
        raise UsageError(f"{min(both)} is in both the training and the validation text; what was trained on shows nothing about new text")
    return text


def _demand_size(text: Text, val: Text | None, settings: DataSettings, context: int) -> None:
    """Raises UsageError where a part has too few bytes for one window, whatever the tokenizer: no token is less than a byte."""
    least = int(context / Fraction(str(settings.val_share))) + 1 if val is None else context + 1
    for part in (text,) if val is None else (text, val):
        if part.size() < least:
            short = f"{_named(part.files)} has {part.size():,} bytes; context={context} needs at least {least:,}"
            raise UsageError(f"{short}: more text or a smaller context")


def _source(text: Text, val: Text | None) -> str:
    parts = [text] if val is None else [text, val]
    with _progress("reading", sum(part.size() for part in parts)) as report:
        prints = [part.fingerprint(report) for part in parts]
    return prints[0] if val is None else hashlib.sha256(" ".join(prints).encode()).hexdigest()


def _made(settings: DataSettings, text: Text, val: Text | None, source: str, folder: Path) -> Tokenizer:
    """The tokenizer that `settings` name; one made of text is kept in `folder` and made once.

    Characters are those of both texts, so that validation knows all of its own; merges are learned from the training text,
    which is the whole where the validation part is cut from it.
    """
    if settings.tokenizer == "bytes":
        return ByteTokenizer()
    if settings.tokenizer not in ("chars", "bpe"):
        path = Path(settings.tokenizer)
        if not path.exists():
            raise UsageError(f"tokenizer is {settings.tokenizer!r}; it must be chars, bytes, bpe or the path of a tokenizer.json")
        return load(path)
    kept = folder / f"tokenizer-{settings.tokenizer}-{_hash(source, settings.bpe_vocab, text.several)}.json"
    if kept.is_file():
        with contextlib.suppress(ValueError):  # damaged: made again
            return load(kept)
    parts = [text] if val is None or settings.tokenizer == "bpe" else [text, val]
    with _progress("making the tokenizer", sum(part.size() for part in parts)) as report:
        chunks = (chunk for part in parts for chunk in part.chunks(report))
        try:
            if settings.tokenizer == "chars":
                made: Tokenizer = CharTokenizer.of_texts(chunks)
            else:
                from sickbay.reference.text.bpe import train_bpe

                made = train_bpe(chunks, settings.bpe_vocab)
        except ValueError as problem:
            raise UsageError(f"no tokenizer can be made of {_named(text.files)}: {problem}") from problem
    partial = kept.with_name(f".{kept.name}-{os.getpid()}")
    made.save(partial)
    partial.replace(kept)
    return made


def _write(text: Text, val: Text | None, tokenizer: Tokenizer, settings: DataSettings, folder: Path) -> None:
    """`folder` holds train.bin, val.bin and corpus.json."""
    train_file, val_file = folder / "train.bin", folder / "val.bin"
    write, ids = tokens.write_tokens if text.pair is None else tokens.write_pairs, _ids(tokenizer, text.pair is not None)
    with _progress("tokens", text.size() + (val.size() if val else 0)) as report:
        written = write(text, tokenizer, train_file, report)
        if not sum(written.lengths):
            raise UsageError(f"{_named(text.files)} holds no document with any text; give one that does")
        if val is None:
            spans = tokens.validation_spans(written.lengths, settings.val_share)
            if text.pair is not None and not tokens.whole_documents(written.lengths, spans):
                raise UsageError(
                    f"{_named(text.files)} has too few pairs for val_share={settings.val_share}; give more pairs, or others as val"
                )
            val_bytes = tokens.bytes_within(written, spans)
            tokens.move(train_file, spans, val_file, ids)
        else:
            spans = []
            val_bytes = float(sum(write(val, tokenizer, val_file, report).text_bytes))
    width = int(tokens.token_type(ids)[-1])
    val_tokens = val_file.stat().st_size // width
    if not val_tokens:
        val_bytes, val_tokens = float(sum(written.text_bytes)), sum(written.lengths)
    augmentation = Augmentation.of(settings)
    if augmentation is not None:
        with _progress("augmenting", text.size() * settings.copies) as report:
            for copy in range(settings.copies):
                append_augmented(text, tokenizer, augmentation, copy, written.lengths, spans, train_file, report)
    told = {
        "format": FORMAT,
        "train_bytes": train_file.stat().st_size,
        "val_bytes": val_file.stat().st_size,
        "bytes_per_token": val_bytes / max(1, val_tokens),
        "several": text.several,
    }
    (folder / "corpus.json").write_text(json.dumps(told, indent=2) + "\n", encoding="utf-8")


def _complete(folder: Path) -> bool:
    try:
        told = json.loads((folder / "corpus.json").read_text(encoding="utf-8"))
        sizes = [(folder / f"{part}.bin").stat().st_size for part in ("train", "val")]
        return bool(told["format"] == FORMAT and sizes == [told["train_bytes"], told["val_bytes"]])
    except (OSError, ValueError, KeyError, TypeError):
        return False


def _key(source: str, settings: DataSettings, tokenizer: Path) -> str:
    """The name of the folder of these tokens: another text, tokenizer, split or augmentation has another."""
    return _hash(FORMAT, source, sources.fingerprint(tokenizer), *settings.of_tokens())


def _ids(tokenizer: Tokenizer, pairs: bool) -> int:
    """Ids that the files of tokens hold: of pairs also what stands between them."""
    return tokenizer.vocab_size + (Translation.extra_ids if pairs else 0)


def _hash(*parts: object) -> str:
    return hashlib.sha256(json.dumps(parts, default=str).encode()).hexdigest()[:16]


def _named(places: Sequence[Path]) -> str:
    return str(places[0]) if len(places) == 1 else f"{places[0]} and {len(places) - 1} more"


@contextlib.contextmanager
def _progress(title: str, size: int) -> Iterator[Report]:
    """What is called with the bytes read moves a bar on a terminal, which is gone at the end."""
    if not sys.stderr.isatty():
        yield sources.nobody
        return
    from rich.console import Console
    from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn

    columns = (TextColumn("{task.description}"), BarColumn(), DownloadColumn(), TimeRemainingColumn())
    with Progress(*columns, console=Console(stderr=True), transient=True) as bar:
        task = bar.add_task(title, total=size)
        yield lambda count: bar.advance(task, count)
