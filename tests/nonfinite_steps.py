"""One training step with everything that `locate` is given in a run, written out by hand; a helper of the test_nonfinite files."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sickbay.exams.fork import NoAnswer
from sickbay.exams.nonfinite import Finding, locate
from sickbay.exams.stretch import Stretch
from sickbay.patient import ForwardCall, LossCall, Patient, user_line
from sickbay.probes.loss_lines import LossLines


class Step:
    """Calls models and losses as a script would, filling `patient`; `backward` asks about the loss first, `examine` about the gradients."""

    def __init__(self, folder: Path | None = None) -> None:
        self.patient, self.lines = Patient(), LossLines()
        self.stretch = Stretch(self.lines.segments)
        self.folder = str(folder) if folder else None

    def forward(self, module: nn.Module, *args: Any, autocast: torch.dtype | None = None, **kwargs: Any) -> Any:
        precision = ("cpu", autocast) if autocast else None
        call = ForwardCall(module, args, kwargs, True, module.training, torch.get_rng_state(), user_line(2), precision)
        self.patient.roots.add(module)
        self.patient.calls.append(call)
        with torch.autocast("cpu", autocast) if autocast else contextlib.nullcontext():
            output = module(*args, **kwargs)
        call.finished = True
        return output

    def cross_entropy(self, logits: Tensor, targets: Tensor) -> Tensor:
        value = F.cross_entropy(logits, targets)
        self.patient.losses.append(LossCall("cross_entropy", logits, targets, -100, "mean", value, user_line(2), True))
        return value

    def backward(self, loss: Tensor) -> Finding | NoAnswer | None:
        """The finding when `loss` is not finite; otherwise backward has run and None is returned."""
        self.lines.end()
        if not torch.isfinite(loss.detach()):
            return locate(self.patient, "loss", loss, self.stretch, self.folder)
        self.stretch.note(loss)
        loss.backward()
        return None

    def examine(self) -> Finding | NoAnswer:
        return locate(self.patient, "gradient", None, self.stretch, self.folder)


@contextlib.contextmanager
def unchanged(*modules: nn.Module) -> Iterator[None]:
    """Inside, nothing may change that training depends on: weights, gradients, buffers, torch's RNG."""

    def state() -> list[Tensor]:
        tensors = [torch.get_rng_state()]
        for module in modules:
            tensors += [t.detach().clone() for t in (*module.parameters(), *module.buffers())]
            tensors += [p.grad.clone() for p in module.parameters() if p.grad is not None]
        return tensors

    before = state()
    yield
    after = state()
    assert len(before) == len(after)
    assert all(torch.equal(bits(a), bits(b)) for a, b in zip(before, after))


def bits(tensor: Tensor) -> Tensor:
    """The memory of `tensor`, in which NaN equals NaN."""
    return tensor.contiguous().reshape(-1).view(torch.uint8)


def found(answer: Finding | NoAnswer | None) -> Finding:
    assert isinstance(answer, Finding), answer
    return answer


def line_with(text: str, file: str) -> str:
    """`file:line` of the only line of `file` that contains `text` as a comment mark."""
    numbers = [number for number, line in enumerate(Path(file).read_text().splitlines(), 1) if f"# {text}" in line]
    assert len(numbers) == 1, (text, numbers)
    return f"{file}:{numbers[0]}"
