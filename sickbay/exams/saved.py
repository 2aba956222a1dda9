"""What an autograd graph keeps for its backward pass: bytes in all and by block, read from the graph itself."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from typing import Any

import torch
from torch import Tensor

MAX_NODES = 200_000
_BLOCK = re.compile(r"^(.*?\.\d+)(?=\.)")


_known_fields: dict[type, tuple[str, ...]] = {}


def _fields(kind: type) -> tuple[str, ...]:
    known = _known_fields.get(kind)
    if known is not None:
        return known
    names = [name for name in dir(kind) if name.startswith("_saved_")]
    found = (*names, "saved_tensors") if "saved_tensors" in dir(kind) and not names else tuple(names)
    _known_fields[kind] = found
    return found


def nodes_of(tensors: Iterable[Tensor], limit: int = MAX_NODES) -> list[Any]:
    """The nodes of the tensors' graphs, at most `limit`."""
    stack: list[Any] = [tensor.grad_fn for tensor in tensors if tensor.grad_fn is not None]
    seen: dict[Any, None] = dict.fromkeys(stack)
    while stack and len(seen) < limit:
        for following, _ in stack.pop().next_functions:
            if following is not None and following not in seen:
                seen[following] = None
                stack.append(following)
    return list(seen)


def saved_in(node: Any) -> tuple[list[Tensor], bool]:
    """The tensors that `node` keeps, and True if its backward has already freed them. Recomputed ones (checkpointing) are none."""
    kept: list[Tensor] = []
    for name in _fields(type(node)):
        try:
            value = getattr(node, name)
        except RuntimeError as problem:
            if "freed" in str(problem):
                return [], True
            continue
        except Exception:  # whatever a recomputation that is refused raises
            continue
        kept.extend(_tensors(value))
    return kept, False


def _tensors(value: Any) -> Iterator[Tensor]:
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, (tuple, list)):
        for inner in value:
            yield from _tensors(inner)


def saved_bytes(tensors: list[Tensor], limit: int = MAX_NODES) -> tuple[int, bool]:
    """Bytes that the graphs of `tensors` still keep, parameters left out, and True if a backward has freed what there was."""
    sizes: dict[int, int] = {}
    nodes = nodes_of(tensors, limit)
    parameters = {leaf.untyped_storage().data_ptr() for leaf in leaves(nodes)}
    freed = False
    for node in nodes:
        kept, gone = saved_in(node)
        freed = freed or gone
        for tensor in kept:
            if tensor.layout == torch.strided and tensor.untyped_storage().data_ptr() not in parameters:
                sizes[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
    return sum(sizes.values()), freed


def leaves(nodes: Iterable[Any]) -> list[Tensor]:
    """The leaf tensors that the nodes would give gradients to."""
    variables = (getattr(node, "variable", None) for node in nodes)
    return [variable for variable in variables if isinstance(variable, Tensor) and variable.layout == torch.strided]


def by_block(tensors: list[Tensor], names: dict[int, str]) -> dict[str, int]:
    """Bytes kept for backward by block: a storage counts for the block whose parameter was used last before it was kept.

    `names`: parameters' names by identity. What lies before or between blocks is under "", what follows the last one under "head".
    """
    nodes = sorted(nodes_of(tensors), key=lambda node: int(node._sequence_nr()))
    parameters = {leaf.untyped_storage().data_ptr() for leaf in leaves(nodes)}
    owner: dict[Any, str] = {}
    for node in nodes:
        variable = getattr(node, "variable", None)
        if isinstance(variable, Tensor) and id(variable) in names:
            owner[node] = names[id(variable)]
    sizes: dict[str, int] = {}
    seen: set[int] = set()
    block, in_blocks = "", False
    # Nodes in the order they were made: a parameter's name tells which block the nodes around its use belong to.
    for node in (node for node in nodes if node not in owner):
        found = [_block_of(name) for name in _parameters_beneath(node, owner)]
        if found:
            block = next((one for one in found if one), "head" if in_blocks else "")
            in_blocks = in_blocks or bool(block)
        for tensor in saved_in(node)[0]:
            if tensor.layout != torch.strided:
                continue
            pointer = tensor.untyped_storage().data_ptr()
            if pointer not in parameters and pointer not in seen:
                seen.add(pointer)
                sizes[block] = sizes.get(block, 0) + tensor.untyped_storage().nbytes()
    return sizes


def _parameters_beneath(node: Any, owner: dict[Any, str]) -> list[str]:
    """Names of the parameters that `node` uses, directly or through a transpose or cast."""
    names = []
    for child, _ in node.next_functions:
        if child in owner:
            names.append(owner[child])
        elif child is not None and len(child.next_functions) == 1 and child.next_functions[0][0] in owner:
            names.append(owner[child.next_functions[0][0]])
    return names


def _block_of(name: str) -> str:
    found = _BLOCK.match(name)
    return found.group(1) if found else ""
