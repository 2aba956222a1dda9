"""The training loops that bench/trainer.py compares, one to a process: `python bench/trainer_loops.py NAME --shape tiny [...]`.

Requests (see turns.py): {"steps": n} trains n steps and answers their seconds; {"losses": n} their losses; {"until": seconds,
"from": a, "to": b} trains for so long, its schedule going from share a to share b, and answers how many steps that was;
{"evaluate": true} answers the loss over the whole validation split; {"facts": true} parameters and FLOPs of a step.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib.util
import itertools
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from turns import Requests

from sickbay.reference import train
from sickbay.reference.data import batches
from sickbay.reference.data.sources import shipped_text
from sickbay.reference.evaluation.evaluation import evaluate
from sickbay.reference.evaluation.flops import training_flops_per_token
from sickbay.reference.models.config import Config
from sickbay.reference.models.model import Transformer
from sickbay.reference.settings.presets import PRESETS
from sickbay.reference.settings.recipe import Recipe
from sickbay.reference.text.tokenizer import CharTokenizer
from sickbay.reference.training import loss, optimizer, schedule
from sickbay.reference.training.machine import processor
from sickbay.reference.training.precision import autocast, settled


@dataclass(frozen=True)
class Shape:
    num_layers: int
    num_heads: int
    dim: int
    context: int
    batch_size: int

    def config(self, **changes: Any) -> Config:
        return Config(dim=self.dim, num_layers=self.num_layers, num_heads=self.num_heads, context=self.context, **changes)


SHAPES = {"tiny": Shape(4, 4, 128, 64, 12), "small": Shape(6, 6, 384, 256, 4)}
# nanoGPT's architecture and its README's recipe for a CPU, in our words.
GPT: dict[str, Any] = {"norm": "layernorm", "positions": "learned", "activation": "gelu", "bias": False}
README = Recipe()
MODERN: dict[str, Any] = {"norm": "rmsnorm", "positions": "rotary", "activation": "relu2", "qk_norm": True, "zero_outputs": True}
BEST = PRESETS["best"]
EXACT: dict[str, Any] = {"precision": "fp32"}
LINEAR: dict[str, Any] = {"schedule": "linear", "min_learning_rate": 0.0, "warmup": 40, "weight_decay": 0.0, "beta2": 0.95}


@dataclass(frozen=True)
class Setting:
    """One of our own loops: what it changes in the model and in the recipe, and the order of its windows."""

    told: str
    config: dict[str, Any] = field(default_factory=lambda: dict(GPT))
    recipe: dict[str, Any] = field(default_factory=dict)
    order: str = "random"
    compile: bool = False


SETTINGS = {
    "ours": Setting("our loop, nanoGPT's model and recipe", recipe=EXACT),
    "ours-compiled": Setting("the same, torch.compile", recipe=EXACT, compile=True),
    "ours-bf16": Setting("the same, products in bf16 (the default where they are faster, from 256 wide on)", recipe={"precision": "bf16"}),
    "schedule": Setting("AdamW 4e-3, linear to zero, each window once", recipe={**LINEAR, "learning_rate": 4e-3}, order="shuffled"),
    "modern": Setting(
        "+ RMSNorm, rotary, QK-norm, ReLU squared, zero outputs", MODERN, {**LINEAR, "learning_rate": 4e-3}, order="shuffled"
    ),
    "best": Setting("+ Muon, output matrix of its own, batch 16 (preset best)", BEST["model"], BEST["recipe"], order=BEST["data"]["order"]),
}
LOOPS = ("nanogpt", "transformers", *SETTINGS)


class Text:
    """The shipped text as ids, nine tenths for training."""

    def __init__(self) -> None:
        path = shipped_text()
        ids = CharTokenizer.of_text(path).encode(path.read_text(encoding="utf-8")).astype(np.uint16)
        self.train, self.validation = batches.split(ids, "train"), batches.split(ids, "val")


Step = Callable[[float], Tensor]  # the share of the schedule that is done -> the loss


def our_step(setting: Setting, shape: Shape, text: Text, start: Path | None = None) -> tuple[Transformer, Step]:
    """Our model and one step of the reference's loop. `start`: weights to begin with, a state dict saved by nanoGPT's model."""
    recipe = Recipe(**{"batch_size": shape.batch_size, **setting.recipe})
    precision = settled(recipe.precision, shape.dim, "cpu")
    torch.manual_seed(recipe.seed)
    model = Transformer(shape.config(**setting.config))
    if start is not None:
        model.load_state_dict(from_nanogpt(torch.load(start, weights_only=True), shape.num_layers))
    if setting.compile:
        model.compile()
    trained = optimizer.make_optimizer(model, recipe)
    feed = batches.random_batches if setting.order == "random" else batches.shuffled_batches
    rows: Iterator[batches.Batch] = feed(text.train, shape.context, recipe.batch_size, recipe.seed)

    def step(progress: float) -> Tensor:
        ids_BT, targets_BT = next(rows)
        optimizer.set_learning_rate(trained, schedule.scheduled(recipe, int(progress * recipe.steps)))
        with autocast(precision, "cpu"):
            value = loss.next_token_loss(model, ids_BT, targets_BT)
        train.backward(value, 1.0)
        train.update(model, trained, recipe.clip)
        return value.detach()

    return model, step


def nanogpt_step(folder: Path, shape: Shape, text: Text, start: Path | None, shared_rows: bool) -> tuple[nn.Module, Step]:
    """nanoGPT's model and what its train.py does in a step on a CPU: memmap opened anew, rows stacked, AdamW as it configures it.

    `shared_rows`: our batches instead of its own, to compare loss curves.
    """
    module = load_nanogpt(folder)
    torch.manual_seed(README.seed)
    shaped = module.GPTConfig(
        n_layer=shape.num_layers, n_head=shape.num_heads, n_embd=shape.dim, block_size=shape.context, bias=False, vocab_size=65, dropout=0.0
    )
    model = module.GPT(shaped)
    if start is not None:
        torch.save(model.state_dict(), start)
    trained = model.configure_optimizers(README.weight_decay, README.learning_rate, (README.beta1, README.beta2), "cpu")
    held = tempfile.NamedTemporaryFile(suffix=".bin")  # noqa: SIM115  # lives as long as the process
    text.train.tofile(held.name)
    shared = batches.random_batches(text.train, shape.context, shape.batch_size, README.seed)

    def rows() -> batches.Batch:
        tokens = np.memmap(held.name, dtype=np.uint16, mode="r")
        places = torch.randint(len(tokens) - shape.context, (shape.batch_size,)).tolist()
        both = [torch.from_numpy(tokens[place : place + shape.context + 1].astype(np.int64)) for place in places]
        return torch.stack([row[:-1] for row in both]), torch.stack([row[1:] for row in both])

    def step(progress: float) -> Tensor:
        ids_BT, targets_BT = next(shared) if shared_rows else rows()
        for group in trained.param_groups:
            group["lr"] = schedule.scheduled(README, int(progress * README.steps))
        _, value = model(ids_BT, targets_BT)
        value.backward()
        nn.utils.clip_grad_norm_(model.parameters(), README.clip or 0.0)
        trained.step()
        trained.zero_grad(set_to_none=True)
        value.item()  # its recipe logs every step
        detached: Tensor = value.detach()
        return detached

    return model, step


def load_nanogpt(folder: Path) -> Any:
    """nanoGPT's model.py as a module."""
    spec = importlib.util.spec_from_file_location("nanogpt_model", folder / "model.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # its dataclass looks itself up
    spec.loader.exec_module(module)
    return module


def from_nanogpt(theirs: dict[str, Tensor], num_layers: int) -> dict[str, Tensor]:
    """nanoGPT's weights by our names; the layouts are the same."""
    ours = {
        "token_embedding.weight": theirs["transformer.wte.weight"],
        "head.weight": theirs["transformer.wte.weight"],
        "position_embedding.weight": theirs["transformer.wpe.weight"],
        "final_norm.weight": theirs["transformer.ln_f.weight"],
    }
    names = {
        "attention_norm": "ln_1",
        "attention.query_key_value": "attn.c_attn",
        "attention.output": "attn.c_proj",
        "feed_forward_norm": "ln_2",
        "feed_forward.up": "mlp.c_fc",
        "feed_forward.down": "mlp.c_proj",
    }
    for layer, (our, their) in itertools.product(range(num_layers), names.items()):
        ours[f"blocks.{layer}.{our}.weight"] = theirs[f"transformer.h.{layer}.{their}.weight"]
    return ours


class Logits(nn.Module):
    """nanoGPT's model as a function from ids to all logits, which it gives only together with targets."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, ids_BT: Tensor) -> Tensor:
        logits_BTV: Tensor = self.model(ids_BT, ids_BT)[0]
        return logits_BTV


def serve(requests: Requests, model: nn.Module, step: Step, shape: Shape, text: Text, judged: nn.Module) -> None:
    done = 0
    for request in requests:
        if "steps" in request or "losses" in request:
            seconds, losses = [], []
            for _ in range(request.get("steps") or request["losses"]):
                began = time.perf_counter()
                losses.append(step(min(1.0, done / README.steps)))
                seconds.append(time.perf_counter() - began)
                done += 1
            requests.answer(seconds if "steps" in request else [float(value) for value in losses])
        elif "until" in request:
            began, count, share = time.perf_counter(), 0, 0.0
            while share < 1.0:
                step(request["from"] + (request["to"] - request["from"]) * share)
                count += 1
                share = (time.perf_counter() - began) / request["until"]
            requests.answer(count)
        elif "evaluate" in request:
            rows = batches.spread_batches(text.validation, shape.context, 64, request.get("rows"))
            requests.answer(evaluate(judged, rows).loss)
        else:
            counted = sum(weight.numel() for weight in model.parameters())
            requests.answer({"parameters": counted, "flops": training_flops_per_token(model, shape.config())})


def serve_transformers(requests: Requests, shape: Shape, text: Text) -> None:
    """transformers' Trainer with a GPT-2 of the same shape; it holds between two steps until it is asked for more."""
    from transformers import GPT2Config, GPT2LMHeadModel, Trainer, TrainerCallback, TrainingArguments

    class Rows(torch.utils.data.Dataset[dict[str, Tensor]]):
        def __len__(self) -> int:
            return 1 << 20

        def __getitem__(self, number: int) -> dict[str, Tensor]:
            place = (number * 7919) % (len(text.train) - shape.context)
            row = torch.from_numpy(text.train[place : place + shape.context].astype(np.int64))
            return {"input_ids": row, "labels": row}

    asked = iter(requests)

    class Turns(TrainerCallback):
        def __init__(self) -> None:
            self.left, self.seconds = next(asked)["steps"], list[float]()
            self.began = time.perf_counter()

        def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            self.seconds.append(time.perf_counter() - self.began)
            self.left -= 1
            if not self.left:
                requests.answer(self.seconds)
                self.left, self.seconds = next(asked, {"steps": 1})["steps"], []
            self.began = time.perf_counter()

    settings = GPT2Config(
        vocab_size=65, n_positions=shape.context, n_embd=shape.dim, n_layer=shape.num_layers, n_head=shape.num_heads,
        resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0, bos_token_id=0, eos_token_id=0,
    )  # fmt: skip
    with tempfile.TemporaryDirectory() as folder:
        wanted = TrainingArguments(
            folder, per_device_train_batch_size=shape.batch_size, max_steps=1 << 17, learning_rate=README.learning_rate,
            weight_decay=README.weight_decay, adam_beta2=README.beta2, lr_scheduler_type="cosine", warmup_steps=README.warmup,
            optim="adamw_torch_fused", report_to=[], save_strategy="no", logging_strategy="no", disable_tqdm=True, use_cpu=True,
        )  # fmt: skip
        Trainer(GPT2LMHeadModel(settings), wanted, train_dataset=Rows(), callbacks=[Turns()]).train()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("name", choices=LOOPS)
    parser.add_argument("--shape", choices=SHAPES, default="tiny")
    parser.add_argument("--nanogpt", type=Path)
    parser.add_argument("--start", type=Path, help="a file of nanoGPT's first weights: nanogpt writes it, ours begins with it")
    args = parser.parse_args()
    requests = Requests()  # before anything prints
    shape, text = SHAPES[args.shape], Text()
    if args.name == "transformers":
        serve_transformers(requests, shape, text)
        return
    if args.name == "nanogpt":
        model, step = nanogpt_step(args.nanogpt, shape, text, args.start, shared_rows=args.start is not None)
        with contextlib.suppress(KeyboardInterrupt):
            serve(requests, model, step, shape, text, Logits(model))
        return
    ours, step = our_step(SETTINGS[args.name], shape, text, args.start)
    with processor(None, flush_denormal=True), contextlib.suppress(KeyboardInterrupt):
        serve(requests, ours, step, shape, text, ours)


if __name__ == "__main__":
    main()
