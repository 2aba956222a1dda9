"""Small models in four styles, their batches, and the hashes of what a training leaves behind."""

from __future__ import annotations

import functools
import hashlib
import random
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

VOCAB, TIME, BATCH, WIDTH, STEPS = 23, 10, 6, 16, 7


def digest(value: Any) -> str:
    """sha256 over a nest of tensors, arrays, bytes and numbers, in order."""
    mark = hashlib.sha256()

    def add(item: Any) -> None:
        if isinstance(item, Tensor):
            mark.update(str((item.dtype, tuple(item.shape))).encode())
            mark.update(item.detach().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())
        elif isinstance(item, np.ndarray):
            mark.update(item.tobytes())
        elif isinstance(item, bytes):
            mark.update(item)
        elif isinstance(item, dict):
            for key, inner in item.items():
                mark.update(repr(key).encode())
                add(inner)
        elif isinstance(item, (list, tuple)):
            for inner in item:
                add(inner)
        else:
            mark.update(repr(item).encode())

    add(value)
    return mark.hexdigest()


def seed(number: int = 0) -> None:
    random.seed(number)
    np.random.seed(number)
    torch.manual_seed(number)


def random_states() -> str:
    return digest([random.getstate(), list(np.random.get_state()), torch.get_rng_state()])


# --- models -----------------------------------------------------------------------------------------------------------


class Block(nn.Module):
    """Masked attention written by hand, ReLU, BatchNorm over features; `checkpointed`: False, "reentrant" or "plain"."""

    def __init__(self, dropout: float) -> None:
        super().__init__()
        self.qkv, self.out = nn.Linear(WIDTH, 3 * WIDTH), nn.Linear(WIDTH, WIDTH)
        self.up, self.down = nn.Linear(WIDTH, 4 * WIDTH), nn.Linear(4 * WIDTH, WIDTH)
        self.norm, self.batch_norm = nn.LayerNorm(WIDTH), nn.BatchNorm1d(WIDTH)
        self.drop = nn.Dropout(dropout)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(self.norm(x)).view(*x.shape[:2], 3, 2, WIDTH // 2).permute(2, 0, 3, 1, 4)
        scores = q @ k.transpose(-1, -2) / (WIDTH // 2) ** 0.5
        scores = scores.masked_fill(torch.ones(x.shape[1], x.shape[1], dtype=torch.bool).triu(1), float("-inf"))
        mixed = (self.drop(scores.softmax(-1)) @ v).transpose(1, 2).reshape(x.shape)
        x = x + self.drop(self.out(mixed))
        normed = self.batch_norm(x.transpose(1, 2)).transpose(1, 2)
        return x + self.drop(self.down(torch.relu(self.up(normed))))


class ByHand(nn.Module):
    def __init__(self, dropout: float = 0.0, checkpointed: str = "") -> None:
        super().__init__()
        self.embed, self.places = nn.Embedding(VOCAB, WIDTH), nn.Parameter(torch.randn(TIME, WIDTH) * 0.02)
        self.blocks = nn.ModuleList(Block(dropout) for _ in range(2))
        self.head = nn.Linear(WIDTH, VOCAB)
        self.checkpointed = checkpointed

    def forward(self, ids: Tensor) -> Tensor:
        x = self.embed(ids) + self.places[: ids.shape[1]]
        for block in self.blocks:
            x = checkpoint(block, x, use_reentrant=self.checkpointed == "reentrant") if self.checkpointed else block(x)
        return self.head(x)


class TorchTransformer(nn.Module):
    """nn.Transformer as an encoder-decoder over the same tokens."""

    def __init__(self, dropout: float = 0.0, checkpointed: str = "") -> None:
        super().__init__()
        self.embed = nn.Embedding(VOCAB, WIDTH)
        self.core = nn.Transformer(WIDTH, 2, 1, 1, 2 * WIDTH, dropout, batch_first=True)
        self.head = nn.Linear(WIDTH, VOCAB)
        self.checkpointed = checkpointed

    def forward(self, ids: Tensor) -> Tensor:
        x = self.embed(ids)
        mask = nn.Transformer.generate_square_subsequent_mask(ids.shape[1])
        if self.checkpointed:
            x = checkpoint(lambda x: self.core(x, x, tgt_mask=mask, tgt_is_causal=True), x, use_reentrant=self.checkpointed == "reentrant")
        else:
            x = self.core(x, x, tgt_mask=mask, tgt_is_causal=True)
        return self.head(x)


class Hugging(nn.Module):
    """transformers' GPT-2 with random weights, giving logits only."""

    def __init__(self, dropout: float = 0.0, checkpointed: str = "") -> None:
        super().__init__()
        from transformers import GPT2Config, GPT2LMHeadModel

        rates = {"resid_pdrop": dropout, "embd_pdrop": dropout, "attn_pdrop": dropout}
        config = GPT2Config(vocab_size=VOCAB, n_positions=TIME, n_embd=WIDTH, n_layer=2, n_head=2, bos_token_id=1, eos_token_id=2, **rates)
        self.core = GPT2LMHeadModel(config)
        if checkpointed:
            self.core.gradient_checkpointing_enable({"use_reentrant": checkpointed == "reentrant"})

    def forward(self, ids: Tensor) -> Tensor:
        return self.core(input_ids=ids, use_cache=False).logits


def reference(dropout: float = 0.0, checkpointed: str = "") -> nn.Module:
    from sickbay.reference.models.config import Config
    from sickbay.reference.models.model import Transformer

    model = Transformer(Config(dim=WIDTH, num_layers=2, num_heads=2, vocab_size=VOCAB, context=TIME, dropout=dropout))
    if checkpointed:
        for block in model.blocks:
            block.forward = functools.partial(checkpoint, block.forward, use_reentrant=checkpointed == "reentrant")
    return model


MODELS: dict[str, Callable[..., nn.Module]] = {
    "by-hand": ByHand,
    "nn.Transformer": TorchTransformer,
    "gpt2": Hugging,
    "reference": reference,
}


def batches(count: int) -> Iterator[tuple[Tensor, Tensor]]:
    for _ in range(count):
        ids = torch.randint(0, VOCAB, (BATCH, TIME + 1))
        yield ids[:, :-1], ids[:, 1:]


def loss_of(model: nn.Module, ids: Tensor, targets: Tensor) -> Tensor:
    return F.cross_entropy(model(ids).reshape(-1, VOCAB), targets.reshape(-1))
