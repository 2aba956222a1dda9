"""What kind of failure an uncaught exception is taken for."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch.distributions import Categorical

from sickbay.patient import Patient
from sickbay.probes.exceptions import read_exception


class Kinds(list[str]):
    """Stands in for the record: the kind of each exception read."""

    def read(self, signal: str, value: float, *, note: dict[str, Any], **place: str) -> None:
        self.append(note["kind"])


def kind_of(exception: BaseException) -> str:
    kinds: Any = Kinds()
    read_exception(exception, kinds, Patient())
    return str(kinds[0])


def test_a_distribution_that_refuses_values_names_a_shape_and_is_no_shape_mismatch() -> None:
    with pytest.raises(ValueError, match="of shape") as caught:
        Categorical(logits=torch.full((2, 3), torch.nan), validate_args=True)
    assert kind_of(caught.value) == "other"


def test_operands_that_do_not_fit_are_a_shape_mismatch() -> None:
    with pytest.raises(RuntimeError) as caught:
        torch.ones(2, 3) @ torch.ones(2, 3)
    assert kind_of(caught.value) == "shape"
