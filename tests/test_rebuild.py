"""A loss is computed again on new logits, also when its backward has run and only the shape of the old ones is left."""

from __future__ import annotations

import torch

from sickbay.exams.rebuild import as_logits


def test_outputs_of_other_values_are_not_the_logits() -> None:
    logits = torch.randn(6, 5)
    output = logits.reshape(2, 3, 5)
    (found,) = {tuple(form.flatten().tolist()) for form in as_logits(output, logits)}
    assert found == tuple(logits.flatten().tolist())
    assert not list(as_logits(output + 1, logits))


def test_of_a_spent_loss_the_shape_decides() -> None:
    spent = torch.empty(6, 5, device="meta")
    assert [tuple(form.shape) for form in as_logits(torch.randn(2, 3, 5), spent)] == [(6, 5)]
    assert not list(as_logits(torch.randn(2, 3, 4), spent))
