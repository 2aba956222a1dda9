"""Altered copies of the training text: words deleted, neighbours swapped, lines translated and back. Off unless asked for.

Deletion and swapping help classifiers (Wei & Zou 2019, EDA), whose label survives them. A causal language model has no
label but the text: it learns to write the deleted and swapped words just so. More data, dropout, weight decay and early
stopping are the better cures for too little text; back-translation (Sennrich et al. 2016) at least leaves sentences whole.
The validation text is never altered, and no copy is made of it.
"""

from __future__ import annotations

import re
from array import array
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from sickbay.core.errors import UsageError
from sickbay.reference.data.sources import CHUNK, Document, Report, Text
from sickbay.reference.data.tokens import Span, separator, token_type
from sickbay.reference.settings.data_settings import DataSettings
from sickbay.reference.text.tokenizer import Tokenizer

Translate = Callable[[Sequence[str]], list[str]]
WORD = re.compile(r"\S+")
TRANSLATED_TOGETHER = 16  # lines
MOST_TRANSLATED_TOKENS = 512

NOISE_WARNING = (
    "words deleted or swapped teach a causal language model to write such text; "
    "more data, dropout, weight decay or early stopping (patience) serve it better"
)
TRANSLATION_WARNING = (
    "back-translated copies teach the translation models' mistakes too; compare the validation loss with a run without them"
)


def delete_words(line: str, share: float, random: np.random.Generator) -> str:
    """`line` without each word that `random` picks with probability `share`, and the space after it; one word always stays."""
    words = list(WORD.finditer(line))
    stay = random.random(len(words)) >= share
    if len(words) and not stay.any():
        stay[random.integers(len(words))] = True
    ends = [word.start() for word in words[1:]] + [len(line)]
    kept = [line[word.start() : end] for word, end, stays in zip(words, ends, stay.tolist()) if stays]
    return line[: words[0].start()] + "".join(kept) if words else line


def swap_words(line: str, share: float, random: np.random.Generator) -> str:
    """`line` with each word that `random` picks with probability `share` in the place of the next, each word moved at most once."""
    words = WORD.findall(line)
    picked = (random.random(max(0, len(words) - 1)) < share).tolist()
    here = 0
    while here < len(picked):
        if picked[here]:
            words[here], words[here + 1] = words[here + 1], words[here]
            here += 1
        here += 1
    left = iter(words)
    return WORD.sub(lambda _: next(left), line)


def back_translated(lines: Sequence[str], there: Translate, back: Translate) -> list[str]:
    """Each line that has words, translated by `there` and then by `back`; one of which no word is left stays as it was.

    Raises ValueError where a translation has another number of lines.
    """
    result = list(lines)
    for translate in (there, back):
        asked = [number for number, line in enumerate(result) if WORD.search(line)]
        said = translate([result[number] for number in asked]) if asked else []
        if len(said) != len(asked):
            raise ValueError(f"the translation of {len(asked)} lines has {len(said)}; it must have as many")
        for number, line in zip(asked, said):
            result[number] = " ".join(line.split("\n"))
    return [line if WORD.search(line) else original for line, original in zip(result, lines)]


@dataclass(frozen=True)
class Augmentation:
    """What happens to a copy of a text, line by line: back-translation, then swapping, then deletion; the same for the same seed."""

    delete: float = 0.0
    swap: float = 0.0
    there: Translate | None = None
    back: Translate | None = None
    seed: int = 0

    @classmethod
    def of(cls, settings: DataSettings) -> Augmentation | None:
        """What `settings` ask for, None = nothing. Raises UsageError where a translation model cannot be loaded."""
        if not settings.augments:
            return None
        there, back = (None if path is None else translator(Path(path)) for path in (settings.translate_there, settings.translate_back))
        return cls(settings.delete_words, settings.swap_words, there, back, settings.augment_seed)

    def of_text(self, text: str, *key: int) -> str:
        """The altered `text`; `key` sets what chance does apart from what it does elsewhere."""
        random = np.random.default_rng((self.seed, *key))
        lines = text.split("\n")
        if self.there is not None and self.back is not None:
            lines = back_translated(lines, self.there, self.back)
        return "\n".join(delete_words(swap_words(line, self.swap, random), self.delete, random) for line in lines)


def warning(settings: DataSettings) -> str:
    """What to know before augmenting as `settings` say; empty where nothing is augmented."""
    noise = NOISE_WARNING if settings.delete_words or settings.swap_words else ""
    return "; ".join(part for part in (noise, TRANSLATION_WARNING if settings.translate_there else "") if part)


def append_augmented(
    text: Text,
    tokenizer: Tokenizer,
    augmentation: Augmentation,
    copy: int,
    lengths: array[int],
    validation: Sequence[Span],
    target: Path,
    report: Report,
) -> None:
    """Copy number `copy` of what is for training in `text` stands at the end of the tokens in `target`.

    `lengths`: tokens of each document of `text`. `validation`: which tokens are not for training. Raises UsageError, OSError.
    """
    dtype, end, begin = token_type(tokenizer.vocab_size), separator(text, tokenizer), 0
    with target.open("ab") as file:
        for number, (document, length) in enumerate(zip(text.documents(report), lengths)):
            chunks = _for_training(document, tokenizer, begin, begin + length, validation)
            altered = (augmentation.of_text(lines, copy, number, block) for block, lines in enumerate(_whole_lines(chunks)))
            count = 0
            for piece in tokenizer.pieces(altered):
                try:
                    ids = tokenizer.encode(piece)
                except ValueError as problem:
                    raise UsageError(f"{document.place}, augmented: {problem}; the tokenizers bytes and bpe know every text") from problem
                file.write(ids.astype(dtype).tobytes())
                count += len(ids)
            if count:
                file.write(np.array(end, dtype=dtype).tobytes())
            begin += length


def _for_training(document: Document, tokenizer: Tokenizer, begin: int, end: int, validation: Sequence[Span]) -> Iterator[str]:
    """The text of the document's tokens, `begin` to `end`, before those in `validation`: spans are whole documents or the last of all."""
    cut = min((max(first, begin) for first, last in validation if first < end and last > begin), default=end)
    if cut == end:
        yield from document.chunks
        return
    for piece in tokenizer.pieces(document.chunks):
        if begin >= cut:
            continue  # read to its end, as the document after it begins there
        ids = tokenizer.encode(piece)
        if begin + len(ids) > cut:
            whole = tokenizer.decode(ids[: cut - begin])
            yield whole[: whole.rfind("\n") + 1]
        else:
            yield piece
        begin += len(ids)


def _whole_lines(chunks: Iterable[str]) -> Iterator[str]:
    """The text of `chunks` in other pieces, which end with a line; only a line longer than a chunk is cut."""
    held = ""
    for chunk in chunks:
        held += chunk
        at = held.rfind("\n") + 1 or (len(held) if len(held) > CHUNK else 0)
        if at:
            yield held[:at]
            held = held[at:]
    if held:
        yield held


def translator(folder: Path) -> Translate:
    """What translates lines by the model in transformers' `folder`, always the same way. Raises UsageError."""
    if not (folder / "config.json").is_file():
        raise UsageError(f"no translation model at {folder}; it must be a folder of transformers: config.json, safetensors, tokenizer")
    try:
        from transformers import AutoModelForSeq2SeqLM, AutoTokenizer
    except ImportError:
        raise UsageError("back-translation needs the transformers library: pip install 'sickbay[huggingface]'") from None
    try:
        tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True)
        model = AutoModelForSeq2SeqLM.from_pretrained(folder, local_files_only=True, use_safetensors=True).eval()
    except (OSError, ValueError, KeyError) as problem:
        reason = str(problem).splitlines()[0]
        raise UsageError(f"the translation model in {folder} cannot be loaded: {reason}") from problem

    def translate(lines: Sequence[str]) -> list[str]:
        said: list[str] = []
        for begin in range(0, len(lines), TRANSLATED_TOGETHER):
            inputs = tokenizer(list(lines[begin : begin + TRANSLATED_TOGETHER]), return_tensors="pt", padding=True, truncation=True)
            with torch.no_grad():
                ids = model.generate(**inputs, do_sample=False, max_new_tokens=MOST_TRANSLATED_TOKENS)
            said += tokenizer.batch_decode(ids, skip_special_tokens=True)
        return said

    return translate
