"""Healthy trainings of transformers' and torch's own models: sizes, seeds, optimizers, precisions, ways of feeding and of going on.

Each recipe is one small model in one loop that does a thing which people rightly do. None may raise a critical or a warning.
"""

from __future__ import annotations

import functools
import io
import os
import random
from collections.abc import Callable, Iterator
from typing import Any

import torch
from healthy_data import BEGIN, END, IGNORED, PAD, Batch, Recipe, causal, corpus, counting, masked, pictures, reversing, vocabulary
from torch import Tensor, nn
from torch.nn import functional

CHANGES: tuple[dict[str, Any], ...] = (
    {},
    {"seed": 1, "width": 48, "layers": 3},
    {"seed": 2, "steps": 1},
    {"steps": 6, "rows": 16},
    {"optimizer": "sgd", "clips": False},
    {"optimizer": "adam", "schedule": "constant"},
    {"precision": "bfloat16", "accumulation": 2},
    {"accumulation": 4, "rows": 4, "padded": "right"},
    {"frozen": "half", "seed": 3},
    {"evaluates": 6, "resumes": True},
    {"schedule": "restarts", "summed": True, "evaluates": 10},
)
CAUSAL_CHANGES: tuple[dict[str, Any], ...] = (
    {"tied": False, "frozen": "embedding"},
    {"generates": True, "steps": 20},
    {"padded": "left", "seed": 4},
)


def recipes() -> dict[str, Recipe]:
    """Every recipe by name."""
    found = [Recipe(model, **change) for model in MODELS for change in CHANGES]
    found += [Recipe(model, **change) for model in CAUSAL for change in CAUSAL_CHANGES]
    found += [Recipe(model, checkpoints=True, steps=16) for model in ("gpt2", "llama")]
    return {recipe.name: recipe for recipe in found}


# --- models -----------------------------------------------------------------------------------------------------------
def _gpt2(recipe: Recipe) -> nn.Module:
    from transformers import GPT2Config, GPT2LMHeadModel

    return GPT2LMHeadModel(
        GPT2Config(
            vocab_size=vocabulary(), n_positions=64, n_embd=recipe.width, n_layer=recipe.layers, n_head=4, bos_token_id=BEGIN,
            eos_token_id=END, pad_token_id=PAD, tie_word_embeddings=recipe.tied,
        )
    )  # fmt: skip


def _llama_like(kind: str, recipe: Recipe) -> nn.Module:
    import transformers

    config = getattr(transformers, f"{kind}Config")(
        vocab_size=vocabulary(), hidden_size=recipe.width, intermediate_size=2 * recipe.width, num_hidden_layers=recipe.layers,
        num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=64, bos_token_id=BEGIN, eos_token_id=END, pad_token_id=PAD,
        tie_word_embeddings=recipe.tied,
    )  # fmt: skip
    model: nn.Module = getattr(transformers, f"{kind}ForCausalLM")(config)
    return model


def _neox(recipe: Recipe) -> nn.Module:
    from transformers import GPTNeoXConfig, GPTNeoXForCausalLM

    return GPTNeoXForCausalLM(
        GPTNeoXConfig(
            vocab_size=vocabulary(), hidden_size=recipe.width, intermediate_size=4 * recipe.width, num_hidden_layers=recipe.layers,
            num_attention_heads=4, max_position_embeddings=64, bos_token_id=BEGIN, eos_token_id=END, pad_token_id=PAD,
            tie_word_embeddings=recipe.tied,
        )
    )  # fmt: skip


def _bert(head: str, recipe: Recipe) -> nn.Module:
    import transformers

    config = transformers.BertConfig(
        vocab_size=vocabulary(), hidden_size=recipe.width, num_hidden_layers=recipe.layers, num_attention_heads=4,
        intermediate_size=4 * recipe.width, max_position_embeddings=64, pad_token_id=PAD, num_labels=2,
    )  # fmt: skip
    model: nn.Module = getattr(transformers, f"BertFor{head}")(config)
    return model


def _t5(recipe: Recipe) -> nn.Module:
    from transformers import T5Config, T5ForConditionalGeneration

    return T5ForConditionalGeneration(
        T5Config(
            vocab_size=vocabulary(), d_model=recipe.width, d_kv=8, d_ff=2 * recipe.width, num_layers=recipe.layers, num_heads=4,
            pad_token_id=PAD, eos_token_id=END, decoder_start_token_id=PAD,
        )
    )  # fmt: skip


def _vit(recipe: Recipe) -> nn.Module:
    from transformers import ViTConfig, ViTForImageClassification

    return ViTForImageClassification(
        ViTConfig(
            image_size=16, patch_size=4, hidden_size=recipe.width, num_hidden_layers=recipe.layers, num_attention_heads=4,
            intermediate_size=2 * recipe.width, num_labels=4,
        )
    )  # fmt: skip


class TorchLM(nn.Module):
    """torch's own encoder layers under a causal mask; returns logits, and the loss as the script writes it."""

    def __init__(self, recipe: Recipe) -> None:
        super().__init__()
        self.table = nn.Embedding(vocabulary(), recipe.width)
        self.places = nn.Embedding(64, recipe.width)
        nn.init.normal_(self.table.weight, std=0.02)
        nn.init.normal_(self.places.weight, std=0.02)
        layer = nn.TransformerEncoderLayer(recipe.width, 4, 4 * recipe.width, dropout=0.1, batch_first=True, norm_first=True)
        self.blocks = nn.TransformerEncoder(layer, recipe.layers, nn.LayerNorm(recipe.width), enable_nested_tensor=False)
        self.head = nn.Linear(recipe.width, vocabulary(), bias=False)
        if recipe.tied:
            self.head.weight = self.table.weight

    def forward(self, input_ids: Tensor, attention_mask: Tensor, position_ids: Tensor | None = None) -> Tensor:
        places = torch.arange(input_ids.shape[1]) if position_ids is None else position_ids
        # A row's own place stays visible: a row of the softmax without any entry is NaN.
        blocked_TT = torch.ones(input_ids.shape[1], input_ids.shape[1], dtype=torch.bool).triu(1)
        empty_B1T = (attention_mask == 0)[:, None]
        blocked = ((blocked_TT | empty_B1T) & ~torch.eye(input_ids.shape[1], dtype=torch.bool)).repeat_interleave(4, 0)
        out: Tensor = self.head(self.blocks(self.table(input_ids) + self.places(places), mask=blocked))
        return out


class TorchSeq2Seq(nn.Module):
    """nn.Transformer from letters to letters."""

    def __init__(self, recipe: Recipe) -> None:
        super().__init__()
        self.table = nn.Embedding(vocabulary(), recipe.width)
        self.places = nn.Parameter(0.02 * torch.randn(16, recipe.width))
        self.body = nn.Transformer(recipe.width, 4, recipe.layers, recipe.layers, 2 * recipe.width, 0.0, batch_first=True, norm_first=True)
        self.head = nn.Linear(recipe.width, vocabulary())

    def forward(self, source: Tensor, target: Tensor) -> Tensor:
        mask = nn.Transformer.generate_square_subsequent_mask(target.shape[1])
        given, wanted = (self.table(ids) + self.places[: ids.shape[1]] for ids in (source, target))
        out: Tensor = self.head(self.body(given, wanted, tgt_mask=mask, tgt_is_causal=True))
        return out


Loss = Callable[[Recipe, Any, Batch], Tensor]


def own_loss(recipe: Recipe, model: Any, batch: Batch) -> Tensor:
    """What the model itself computes from `labels`; where the loss is to be summed, tokens are counted as the Trainer does."""
    if recipe.summed and "attention_mask" in batch and batch["labels"].dim() == 2:
        batch = {**batch, "num_items_in_batch": (batch["labels"][:, 1:] != IGNORED).sum()}
    loss: Tensor = model(**batch).loss
    return loss


def masked_loss(recipe: Recipe, model: Any, batch: Batch) -> Tensor:
    loss: Tensor = model(**batch).loss
    return loss


def shifted_loss(recipe: Recipe, model: Any, batch: Batch) -> Tensor:
    """The script shifts by itself."""
    logits = model(**{key: value for key, value in batch.items() if key != "labels"})
    targets = batch["labels"][:, 1:].flatten()
    reduction = "sum" if recipe.summed else "mean"
    loss = functional.cross_entropy(logits[:, :-1].flatten(0, 1).float(), targets, ignore_index=IGNORED, reduction=reduction)
    return loss / (targets != IGNORED).sum() if recipe.summed else loss


def forced_loss(recipe: Recipe, model: Any, batch: Batch) -> Tensor:
    """The decoder is given the answer one place later."""
    labels = batch["labels"]
    given = torch.cat([torch.full((len(labels), 1), BEGIN), labels[:, :-1]], 1)
    return functional.cross_entropy(model(batch["input_ids"], given).flatten(0, 1).float(), labels.flatten())


Model = tuple[Callable[[Recipe], nn.Module], Callable[[Recipe, str], Iterator[Batch]], Loss]
CAUSAL: dict[str, Model] = {
    "gpt2": (_gpt2, causal, own_loss),
    "llama": (functools.partial(_llama_like, "Llama"), causal, own_loss),
    "qwen2": (functools.partial(_llama_like, "Qwen2"), causal, own_loss),
    "mistral": (functools.partial(_llama_like, "Mistral"), causal, own_loss),
    "gpt-neox": (_neox, causal, own_loss),
    "nn.TransformerEncoder": (TorchLM, causal, shifted_loss),
}
MODELS: dict[str, Model] = {
    **CAUSAL,
    "bert, masked": (functools.partial(_bert, "MaskedLM"), masked, masked_loss),
    "bert, classes": (functools.partial(_bert, "SequenceClassification"), counting, masked_loss),
    "t5": (_t5, reversing, masked_loss),
    "nn.Transformer": (TorchSeq2Seq, reversing, forced_loss),
    "vit": (_vit, pictures, masked_loss),
}
RATES = {"adamw": 1e-3, "adam": 5e-4, "sgd": 0.05}


# --- the loop ---------------------------------------------------------------------------------------------------------
def optimizer_of(recipe: Recipe, model: nn.Module) -> torch.optim.Optimizer:
    """Over the parameters that are trained."""
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    rate = recipe.rate or RATES[recipe.optimizer]
    if recipe.optimizer == "sgd":
        return torch.optim.SGD(trained, lr=rate, momentum=0.9)
    return (torch.optim.AdamW if recipe.optimizer == "adamw" else torch.optim.Adam)(trained, lr=rate)


def schedule_of(recipe: Recipe, optimizer: torch.optim.Optimizer) -> torch.optim.lr_scheduler.LRScheduler | None:
    """Stepped after every optimizer step; None: the rate is constant."""
    schedulers = torch.optim.lr_scheduler
    if recipe.schedule == "constant":
        return None
    if recipe.schedule == "restarts":
        return schedulers.CosineAnnealingWarmRestarts(optimizer, T_0=8)
    warm = max(1, recipe.steps // 6)
    return schedulers.LambdaLR(optimizer, lambda step: min(1.0, (step + 1) / warm) * max(0.1, 1 - step / max(1, recipe.steps)))


def freeze(recipe: Recipe, model: nn.Module) -> None:
    """Some parameters are not trained, on purpose."""
    named = list(model.named_parameters())
    chosen = named[: len(named) // 2] if recipe.frozen == "half" else named[:1] if recipe.frozen else []
    for _, parameter in chosen:
        parameter.requires_grad_(False)


def train(recipe: Recipe) -> list[float]:
    """Each step's loss."""
    torch.manual_seed(recipe.seed)
    random.seed(recipe.seed)
    build, feed, loss_of = MODELS[recipe.model]
    model: Any = build(recipe)
    freeze(recipe, model)
    if recipe.checkpoints:
        model.gradient_checkpointing_enable()
    model.train()
    optimizer = optimizer_of(recipe, model)
    schedule = schedule_of(recipe, optimizer)
    batches, held_out = feed(recipe, "train"), feed(recipe, "validation")
    losses = []
    for step in range(recipe.steps):
        optimizer.zero_grad()
        total = 0.0
        micro_batches = [next(batches) for _ in range(recipe.accumulation)]
        counts = [int((batch["labels"] != IGNORED).sum()) for batch in micro_batches]
        for batch, count in zip(micro_batches, counts):
            with torch.autocast("cpu", torch.bfloat16, enabled=recipe.precision == "bfloat16"):
                loss = loss_of(recipe, model, batch)
            (loss * (count / sum(counts))).backward()
            total += loss.item() * count / sum(counts)
        if recipe.clips:
            nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        if schedule is not None:
            schedule.step()
        losses.append(total)
        if recipe.evaluates and (step + 1) % recipe.evaluates == 0:
            evaluate(recipe, model, held_out, loss_of)
        if recipe.resumes and step == recipe.steps // 2:
            model, optimizer, schedule = resumed(recipe, build, model, optimizer, schedule)
    if recipe.generates:
        generate(recipe, model)
    return losses


def evaluate(recipe: Recipe, model: Any, held_out: Iterator[Batch], loss_of: Loss) -> float:
    """Mean loss of four batches; training mode is on again afterwards."""
    model.eval()
    with torch.no_grad():
        losses = [loss_of(recipe, model, next(held_out)).item() for _ in range(4)]
    model.train()
    return sum(losses) / len(losses)


def resumed(recipe: Recipe, build: Callable[[Recipe], nn.Module], model: Any, optimizer: Any, schedule: Any) -> tuple[Any, Any, Any]:
    """A new model, optimizer and schedule that go on where the old ones stopped."""
    file = io.BytesIO()
    torch.save({"model": model.state_dict(), "optimizer": optimizer.state_dict(), "schedule": schedule and schedule.state_dict()}, file)
    file.seek(0)
    state = torch.load(file)
    model = build(recipe)
    freeze(recipe, model)
    model.load_state_dict(state["model"])
    model.train()
    optimizer = optimizer_of(recipe, model)
    schedule = schedule_of(recipe, optimizer)
    optimizer.load_state_dict(state["optimizer"])
    if schedule is not None:
        schedule.load_state_dict(state["schedule"])
    return model, optimizer, schedule


def generate(recipe: Recipe, model: Any) -> Tensor:
    """`(1, 24)` ids, sampled; by the library where it can."""
    model.eval()
    prompt = corpus()[0][None, :8]
    with torch.no_grad():
        if hasattr(model, "generate"):
            ids: Tensor = model.generate(prompt, attention_mask=torch.ones_like(prompt), max_new_tokens=16, do_sample=True)
            return ids
        for _ in range(16):
            logits = model(prompt, torch.ones_like(prompt))[:, -1]
            prompt = torch.cat([prompt, torch.multinomial(logits.softmax(-1), 1)], 1)
    return prompt


if __name__ == "__main__":
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    for name, recipe in recipes().items():
        curve = train(recipe)
        print(f"{name:<70} {curve[0]:.3f} to {curve[-1]:.3f}")
