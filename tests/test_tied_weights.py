"""Which embedding and which output layer are held against each other."""

from __future__ import annotations

import torch
from torch import nn

from sickbay.probes.parameters import _named_by_model


class Classifier(nn.Module):
    """Two segments, two classes: an embedding and a classifier of the same shape; `output` is what the model calls its output layer."""

    def __init__(self, named: bool) -> None:
        super().__init__()
        self.segments, self.classifier, self.named = nn.Embedding(2, 8), nn.Linear(8, 2), named

    def get_output_embeddings(self) -> nn.Module | None:
        return self.classifier if self.named else None


def pairs_of(model: Classifier) -> list[tuple[str, torch.Tensor, str, torch.Tensor]]:
    return [("segments", model.segments.weight, "classifier", model.classifier.weight)]


def test_a_classifier_of_an_embeddings_shape_is_no_output_embedding_unless_the_model_says_so() -> None:
    plain, named = Classifier(named=False), Classifier(named=True)
    assert _named_by_model(plain, pairs_of(plain)) == []
    assert _named_by_model(named, pairs_of(named)) == pairs_of(named)


def test_a_head_outside_the_model_that_names_its_output_is_still_compared() -> None:
    inner = Classifier(named=False)
    root = nn.ModuleDict({"inner": inner, "head": nn.Linear(8, 2)})
    pair = ("inner.segments", inner.segments.weight, "head", root["head"].weight)
    assert _named_by_model(root, [pair]) == [pair]
