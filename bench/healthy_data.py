"""What the healthy trainings are made of: one recipe per run, and the batches it is fed from the shipped text."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

TEXT = Path(__file__).resolve().parent.parent / "examples" / "data" / "tinyshakespeare.txt"
SPECIAL = 4  # ids below the letters: padding, beginning, end, mask
PAD, BEGIN, END, MASK = range(SPECIAL)
IGNORED = -100
VALIDATION_SHARE = 0.1


@dataclass(frozen=True)
class Recipe:
    """One training. `rate` 0: the optimizer's usual one; `padded`: "", "right" or "left"; `frozen`: "", "embedding" or "half"."""

    model: str
    seed: int = 0
    steps: int = 24
    rows: int = 8
    length: int = 32
    width: int = 32
    layers: int = 2
    optimizer: str = "adamw"
    rate: float = 0.0
    precision: str = "float32"
    accumulation: int = 1
    schedule: str = "warm-up"
    padded: str = ""
    frozen: str = ""
    tied: bool = True
    evaluates: int = 0
    generates: bool = False
    resumes: bool = False
    clips: bool = True
    checkpoints: bool = False
    summed: bool = False

    @property
    def name(self) -> str:
        """The model and what differs from the plain recipe."""
        different = [
            f"{field.name} {getattr(self, field.name)}"
            for field in dataclasses.fields(self)
            if field.name != "model" and getattr(self, field.name) != field.default
        ]
        return ", ".join([self.model, *different])


@functools.cache
def corpus() -> tuple[Tensor, int]:
    """Ids `(N,)` int64 of some text, from SPECIAL on, and the number of ids."""
    text = TEXT.read_text(encoding="utf-8")[:100_000]
    letters = sorted(set(text))
    number = {letter: index + SPECIAL for index, letter in enumerate(letters)}
    return torch.tensor([number[letter] for letter in text]), len(letters) + SPECIAL


def vocabulary() -> int:
    return corpus()[1]


def crops(recipe: Recipe, split: str) -> Iterator[Tensor]:
    """Endless `(rows, length + 1)` int64 crops of one part of the text."""
    ids = corpus()[0]
    border = int(len(ids) * (1 - VALIDATION_SHARE))
    part = ids[:border] if split == "train" else ids[border:]
    draw = torch.Generator().manual_seed(recipe.seed)
    while True:
        places = torch.randint(len(part) - recipe.length - 1, (recipe.rows,), generator=draw)
        yield torch.stack([part[place : place + recipe.length + 1] for place in places])


Batch = dict[str, Tensor]


def causal(recipe: Recipe, split: str) -> Iterator[Batch]:
    """`labels` are the ids; the model shifts them. Padding is masked and its labels ignored."""
    lengths = torch.Generator().manual_seed(recipe.seed)
    for crop in crops(recipe, split):
        ids = crop[:, :-1]
        batch = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": ids.clone()}
        if recipe.padded:
            length_B1 = torch.randint(recipe.length // 2, recipe.length + 1, (recipe.rows, 1), generator=lengths)
            place_T = torch.arange(recipe.length)
            empty_BT = place_T >= length_B1 if recipe.padded == "right" else place_T < recipe.length - length_B1
            batch = {
                "input_ids": ids.masked_fill(empty_BT, PAD),
                "attention_mask": (~empty_BT).long(),
                "labels": ids.masked_fill(empty_BT, IGNORED),
            }
            if recipe.padded == "left":
                batch["position_ids"] = (batch["attention_mask"].cumsum(1) - 1).clamp(min=0)
        yield batch


def masked(recipe: Recipe, split: str) -> Iterator[Batch]:
    """A seventh of the ids is hidden and asked for."""
    draw = torch.Generator().manual_seed(recipe.seed + 100)
    for batch in causal(recipe, split):
        ids = batch["input_ids"]
        hidden = (torch.rand(ids.shape, generator=draw) < 1 / 7) & (ids != PAD)
        hidden[:, 1] |= ids[:, 1] != PAD
        yield {
            "input_ids": ids.masked_fill(hidden, MASK),
            "attention_mask": batch["attention_mask"],
            "labels": ids.masked_fill(~hidden, IGNORED),
        }


def reversing(recipe: Recipe, split: str) -> Iterator[Batch]:
    """Eight letters in, the same letters in upside-down order out, and an end."""
    for crop in crops(recipe, split):
        ids = crop[:, :8]
        yield {"input_ids": ids, "labels": torch.cat([ids.flip(1), torch.full((len(ids), 1), END)], 1)}


def counting(recipe: Recipe, split: str) -> Iterator[Batch]:
    """Whether a row has more of one half of the alphabet than of the other."""
    middle = (SPECIAL + vocabulary()) // 2
    for crop in crops(recipe, split):
        ids = crop[:, :-1]
        yield {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": (ids > middle + 12).float().mean(1).gt(0.52).long()}


def pictures(recipe: Recipe, split: str) -> Iterator[Batch]:
    """Noisy pictures with one bright quarter; which one is asked."""
    draw = torch.Generator().manual_seed(recipe.seed + (split != "train"))
    while True:
        label = torch.randint(4, (recipe.rows,), generator=draw)
        image = torch.randn(recipe.rows, 3, 16, 16, generator=draw)
        for row, quarter in enumerate(label.tolist()):
            image[row, :, 8 * (quarter // 2) :, 8 * (quarter % 2) :][:, :8, :8] += 1.0
        yield {"pixel_values": image, "labels": label}
