"""What a run trains on, as one value."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, get_args

from sickbay.reference.settings.demand import demand, is_count, is_number

Order = Literal["random", "shuffled"]
LEAST_BPE = 257  # the 256 bytes and the id that ends a document


@dataclass(frozen=True)
class DataSettings:
    """How texts become tokens and batches. A value outside its range raises ValueError with field, value and range.

    `tokenizer`: chars (of the text's own characters), bytes, bpe (trained on the text), or the path of a tokenizer.json.
    `bpe_vocab`: most ids of a bpe tokenizer.
    `field`: of a JSONL row, the one that holds the text.
    `source_field`: of a JSONL row of pairs, the one that holds the source; a TSV row is source, tab, target.
    `target_field`: the one that holds the target.
    `val`: a text for validation alone, as a file or folder; none = `val_share` of the text.
    `val_share`: share of the text kept for validation: whole documents where there are several, else its end.
    `order`: random places in each batch, or shuffled: every window once in an epoch. Pairs always come once in an epoch.
    `packed`: documents of one row are kept apart: none sees another, and none has to predict another's first token.
    `cache`: folder of the tokens, used again by runs on the same text; none = tokens/ beside the run's folder.
    `delete_words`: share of words deleted in augmented copies of the training text (Wei & Zou 2019 use 0.1).
    `swap_words`: share of words that change places with the next one in augmented copies.
    `translate_there`: folder of a translation model for back-translated copies (Sennrich et al. 2016), with `translate_back`.
    `translate_back`: folder of the model that translates back.
    `copies`: augmented copies added to the training text where it is augmented.
    `augment_seed`: of which words are deleted and swapped.
    """

    tokenizer: str = "chars"
    bpe_vocab: int = 4096
    field: str = "text"
    source_field: str = "source"
    target_field: str = "target"
    val: str | None = None
    val_share: float = 0.1
    order: Order = "random"
    packed: bool = False
    cache: str | None = None
    delete_words: float = 0.0
    swap_words: float = 0.0
    translate_there: str | None = None
    translate_back: str | None = None
    copies: int = 1
    augment_seed: int = 0

    def __post_init__(self) -> None:
        for field in ("tokenizer", "field", "source_field", "target_field"):
            value = getattr(self, field)
            demand(field, value, isinstance(value, str) and bool(value), "a text that is not empty")
        demand("target_field", self.target_field, self.target_field != self.source_field, "another field than source_field")
        for field in ("val", "cache", "translate_there", "translate_back"):
            value = getattr(self, field)
            demand(field, value, value is None or (isinstance(value, str) and bool(value)), "none or a path")
        demand(
            "bpe_vocab", self.bpe_vocab, is_count(self.bpe_vocab, LEAST_BPE), f"an integer of at least {LEAST_BPE}: the bytes and an end"
        )
        demand("order", self.order, self.order in get_args(Order), f"one of {', '.join(get_args(Order))}")
        demand("packed", self.packed, isinstance(self.packed, bool), "True or False")
        for field in ("val_share", "delete_words", "swap_words"):
            value = getattr(self, field)
            demand(field, value, is_number(value) and 0 <= value < 1, "at least 0 and below 1")
        demand("val_share", self.val_share, self.val is not None or self.val_share > 0, "above 0 where no val text is given")
        both = (self.translate_there is None) == (self.translate_back is None)
        demand("translate_back", self.translate_back, both, "given exactly where translate_there is: one model for each direction")
        demand("copies", self.copies, is_count(self.copies), "an integer of at least 1")
        demand("augment_seed", self.augment_seed, is_count(self.augment_seed, 0), "an integer of at least 0")

    @property
    def augments(self) -> bool:
        """Whether anything is added to the training text."""
        return self.delete_words > 0 or self.swap_words > 0 or self.translate_there is not None

    def of_tokens(self) -> tuple[object, ...]:
        """The settings that the tokens depend on, beside the texts and the tokenizer."""
        augmentation = (self.delete_words, self.swap_words, self.translate_there, self.translate_back, self.copies, self.augment_seed)
        return (self.field, self.val is None and self.val_share, augmentation if self.augments else None)
