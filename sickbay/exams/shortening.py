"""How much a row's answers move when the padding behind it is cut off: what they owe to how far the row was padded."""

from __future__ import annotations

import dataclasses

import torch
from torch import Tensor

from sickbay.exams.perturbation import Readout, Tokens, change, replacing
from sickbay.exams.sequences import Rerun, float_leaves
from sickbay.exams.trace import batch_size
from sickbay.patient import mapped

_ROWS = 4  # looked at, each by itself
_LEAVES = ("pooled", "01")


def cut_influence(again: Rerun, readout: Readout, tokens: Tokens) -> float | None:
    """Change of the answers to real tokens when trailing padding is cut off, over their change when the real tokens are others.

    The mean over a few rows, run one by one without dropout. None where rows cannot be shortened: padding on the left, answers that are
    not in the output, a model of fixed length, no module. For use inside a forked copy.
    """
    call, module = again.call, again.module
    length = tokens.ids.shape[1]
    if call is None or module is None or readout.loss is not None or readout.axes not in _LEAVES or tokens.axis != 1:
        return None
    batch = batch_size(call)
    tensors = [tensor for _, tensor in again.arguments]
    if batch == length or any(batch in tensor.shape[1:] for tensor in tensors):
        return None
    real = (~tokens.padding).sum(1)
    ends = torch.equal(tokens.padding, torch.arange(length) >= real[:, None])
    rows = [row for row in range(len(real)) if 1 < int(real[row]) < length][:_ROWS]
    if not ends or not rows:
        return None
    modes = [(part, part.training) for part in module.modules()]
    module.eval()
    try:
        ratios = [_ratio(again, readout, tokens, row, batch) for row in rows]
    except Exception:
        return None
    finally:
        again.call = call
        for part, training in modes:
            part.training = training
    return sum(ratios) / len(ratios)


def _ratio(again: Rerun, readout: Readout, tokens: Tokens, row: int, batch: int) -> float:
    call, length = again.call, tokens.ids.shape[1]
    real = int((~tokens.padding[row]).sum())
    assert call is not None

    def answers(width: int, tokens: Tokens | None = None) -> Tensor:
        def part(tensor: Tensor) -> Tensor:
            if tensor.dim() == 0 or tensor.shape[0] != batch:
                return tensor
            mine = tensor[row : row + 1]
            for axis in range(1, mine.dim()):
                mine = mine.narrow(axis, 0, width) if mine.shape[axis] == length else mine
            return mine

        again.call = dataclasses.replace(call, args=mapped(call.args, part), kwargs=mapped(call.kwargs, part))
        intercept = replacing(tokens, ~tokens.padding) if tokens is not None else None
        leaf = float_leaves(again(intercept))[readout.leaf].detach().double()
        again.call = call
        return leaf.reshape(1, 1, -1) if readout.axes == "pooled" else leaf[:, :real].flatten(2)

    whole = answers(length)
    own = change(whole, answers(length, Tokens(tokens.group, tokens.ids[row : row + 1], 1, tokens.padding[row : row + 1], tokens.seed)))
    return float(change(whole, answers(real)).mean()) / float(own.mean())
