"""Low-rank adapters beside chosen linear layers (Hu et al. 2022): a small part of a model is trained, the rest stays as it was.

lora.apply(model, rank=8, alpha=16)      everything else is frozen
...                                      train as ever
lora.save(model, file)                   the adapters alone
lora.merge(model)                        plain layers again, to be saved, generated with, or written by pretrained.save
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from fnmatch import fnmatchcase
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.nn import functional

from sickbay.core.errors import UsageError
from sickbay.reference.settings.demand import is_count, is_number

TARGETS = ("attention.query_key_value", "attention.output")


class LowRankLinear(nn.Linear):
    """W x + (alpha / rank) B A x, where only A `(rank, inputs)` and B `(outputs, rank)` are trained (Hu et al. 2022, eq. 3).

    W and its bias are the parameters of `base`, by their names: a state dict of the plain layer is a part of this one's.
    """

    def __init__(self, base: nn.Linear, rank: int, alpha: float) -> None:
        super().__init__(base.in_features, base.out_features, bias=base.bias is not None, device="meta")
        self.weight, self.bias = base.weight, base.bias
        self.rank, self.alpha = rank, alpha
        # B is zero, so that the model starts as it was; A is not, or no gradient would ever reach either.
        self.lora_a = nn.Parameter(base.weight.new_empty(rank, base.in_features).normal_(std=1 / math.sqrt(base.in_features)))
        self.lora_b = nn.Parameter(base.weight.new_zeros(base.out_features, rank))

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) + functional.linear(functional.linear(x, self.lora_a), self.lora_b) * (self.alpha / self.rank)

    def merged(self) -> nn.Linear:
        """A plain layer with the same function; its weight is `weight` itself, changed in place."""
        plain = nn.Linear(self.in_features, self.out_features, bias=self.bias is not None, device="meta")
        with torch.no_grad():
            self.weight += self.lora_b @ self.lora_a * (self.alpha / self.rank)
        plain.weight, plain.bias = self.weight, self.bias
        return plain.train(self.training)


def apply(model: nn.Module, rank: int, alpha: float, targets: Sequence[str] = TARGETS) -> list[str]:
    """The names of the layers of `model` that now have adapters, drawn from torch's random state; all other parameters are frozen.

    `targets`: ends of the names of linear layers, such as "attention.output", or patterns, such as "blocks.0.*". `alpha` / `rank`
    scales what is added. Raises UsageError for a value outside its range, a target that is none, or a layer whose weight is shared.
    """
    if not is_number(alpha) or alpha <= 0:
        raise UsageError(f"lora alpha is {alpha!r}; it must be above 0")
    chosen = _chosen(model, targets)
    for name, layer in chosen.items():
        widest = min(layer.in_features, layer.out_features)
        if not is_count(rank) or rank > widest:
            raise UsageError(f"lora rank is {rank!r}; it must be an integer from 1 to {widest}, the smaller side of {name}")
    model.requires_grad_(False)
    for name, layer in chosen.items():
        _put(model, name, LowRankLinear(layer, rank, alpha))
    return list(chosen)


def merge(model: nn.Module) -> None:
    """`model` has no adapters any more and the same function. What is frozen stays so."""
    for name, layer in _adapted(model).items():
        _put(model, name, layer.merged())


def save(model: nn.Module, file: Path) -> None:
    """The adapters of `model`, without what they adapt, stand in the safetensors `file`. Raises OSError, UsageError (there are none)."""
    tensors = {}
    for name, layer in _adapted(model).items():
        tensors[f"{name}.lora_a"], tensors[f"{name}.lora_b"] = layer.lora_a.detach(), layer.lora_b.detach()
        tensors[f"{name}.alpha"] = torch.tensor(layer.alpha, dtype=torch.float64)
    if not tensors:
        raise UsageError("the model has no adapters to save")
    partial = file.with_name(file.name + ".partial")
    save_file(tensors, partial)
    partial.replace(file)


def load(model: nn.Module, file: Path) -> list[str]:
    """`model` has the adapters that `save` left in `file`, as by `apply`; the names of their layers.

    Raises UsageError where the file cannot be read or is not of such a model; the model is then as it was.
    """
    try:
        tensors = load_file(file)
    except (SafetensorError, OSError) as problem:
        raise UsageError(f"{file} holds no adapters: {problem}") from problem
    alphas = {name.removesuffix(".alpha"): float(tensors[name]) for name in sorted(tensors) if name.endswith(".alpha")}
    plain = {name: layer for name, layer in model.named_modules() if type(layer) is nn.Linear}
    made = {}
    for name, alpha in alphas.items():
        a, b = tensors.get(f"{name}.lora_a"), tensors.get(f"{name}.lora_b")
        if a is None or b is None or name not in plain or (b.shape[0], a.shape[1]) != tuple(plain[name].weight.shape):
            shape = "no such layer" if name not in plain else f"a layer {tuple(plain[name].weight.shape)}"
            raise UsageError(f"{file} is of another model: it adapts {name}, and this one has {shape}")
        made[name] = LowRankLinear(plain[name], len(a), alpha)
        with torch.no_grad():
            made[name].lora_a.copy_(a)
            made[name].lora_b.copy_(b)
    if not made:
        raise UsageError(f"{file} holds no adapters")
    model.requires_grad_(False)
    for name, layer in made.items():
        layer.lora_a.requires_grad_(True)
        layer.lora_b.requires_grad_(True)
        _put(model, name, layer)
    return list(made)


def _chosen(model: nn.Module, targets: Sequence[str]) -> dict[str, nn.Linear]:
    linear = {name: layer for name, layer in model.named_modules() if type(layer) is nn.Linear}
    uses: dict[int, list[str]] = {}
    for name, weight in model.named_parameters(remove_duplicate=False):
        uses.setdefault(id(weight), []).append(name)
    chosen: dict[str, nn.Linear] = {}
    for target in targets:
        found = {name: layer for name, layer in linear.items() if fnmatchcase(name, target) or fnmatchcase(name, f"*.{target}")}
        if not found:
            kinds = sorted({name.rpartition(".")[0].rpartition(".")[2] + "." + name.rpartition(".")[2] for name in linear})
            raise UsageError(
                f"lora targets: no linear layer is called {target!r}; there are {', '.join(kind.lstrip('.') for kind in kinds)}"
            )
        chosen |= found
    for name, layer in chosen.items():
        if len(others := uses[id(layer.weight)]) > 1:
            raise UsageError(
                f"lora targets: {name} shares its weight ({' = '.join(others)}), which a merge would change for both; leave it out"
            )
    if not chosen:
        raise UsageError("lora targets are empty; name at least one linear layer")
    return chosen


def _adapted(model: nn.Module) -> dict[str, LowRankLinear]:
    return {name: layer for name, layer in model.named_modules() if isinstance(layer, LowRankLinear)}


def _put(model: nn.Module, name: str, layer: nn.Module) -> None:
    """`layer` stands in the place of the module `name`."""
    parent, _, child = name.rpartition(".")
    setattr(model.get_submodule(parent), child, layer)
