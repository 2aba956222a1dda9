"""How to train, as one value."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, get_args

from sickbay.reference.settings.demand import demand, is_count, is_number

Objective = Literal["next-token", "masked-token", "span-corruption", "pairs"]
Schedule = Literal["cosine", "linear", "wsd", "constant"]
OptimizerKind = Literal["adamw", "muon"]
Recompute = Literal["none", "block", "sqrt"]
Precision = Literal["auto", "fp32", "bf16", "fp16"]
Parallel = Literal["none", "ddp", "fsdp", "tp"]


@dataclass(frozen=True)
class Recipe:
    """How to train; the defaults are nanoGPT's recipe for a CPU. A value outside its range raises ValueError with field, value and range.

    `objective`: next-token (a decoder), masked-token (an encoder: Devlin et al. 2019), span-corruption (an encoder-decoder: Raffel et al.
        2020) or pairs (an encoder-decoder, of a source and its target).
    `mask_share`: share of a row's tokens that masked-token asks for, or that span-corruption cuts out.
    `mean_span`: mean tokens of a span that span-corruption cuts out.
    `steps`: optimizer steps.
    `batch_size`: rows of one micro-batch.
    `accumulation`: micro-batches of one step, weighted by their tokens.
    `optimizer`: adamw (Loshchilov & Hutter 2019), or muon for the blocks' matrices and adamw for the rest (Jordan et al. 2024).
    `learning_rate`: the highest, of what AdamW trains.
    `min_learning_rate`: the last one; none = a tenth of the highest.
    `matrix_learning_rate`: the highest, of what Muon trains; it follows the same schedule.
    `schedule`: after the warm-up: cosine (Loshchilov & Hutter 2017), linear, wsd (constant, then linear: Hu et al. 2024) or constant.
    `warmup`: steps of linear rise.
    `decay_share`: share of all steps in which wsd falls.
    `beta1`: AdamW's decay rate of the mean gradient.
    `beta2`: AdamW's decay rate of the mean square.
    `momentum`: Muon's decay rate of the mean gradient.
    `weight_decay`: of the matrices AdamW trains, decoupled: learning rate x this is lost in each step.
    `matrix_weight_decay`: of the matrices Muon trains, decoupled likewise.
    `clip`: largest global L2 norm of the gradient, none = never clipped.
    `from_pretrained`: folder of a trained model, ours or transformers', to start from; none = weights drawn at random.
    `freeze`: names or patterns, between commas, of what is not trained: token_embedding,blocks.[0-3]; none = all is trained.
    `lora_rank`: rank of the adapters that are trained instead of the weights (Hu et al. 2022); none = the weights themselves.
    `lora_alpha`: alpha / rank scales what adapters add.
    `lora_targets`: ends of the names, between commas, of the layers that get adapters.
    `label_smoothing`: share of each target spread over the vocabulary (Szegedy et al. 2016).
    `z_loss`: weight of log(Z) squared, which keeps logits from drifting; PaLM's is 1e-4 (Chowdhery et al. 2022, section 5).
    `ema`: decay rate of an average of the weights, evaluated and saved beside them; none = no average.
    `patience`: evaluations without a better validation loss after which the run ends, its best checkpoint kept; none = never.
    `recompute`: activations computed again in the backward pass: none, of each block, or of sqrt(layers) segments (Chen et al. 2016).
    `precision`: of the forward pass: fp32, bf16 or fp16 (with a gradient scaler); weights stay float32. auto = the faster of fp32 and
        bf16 on the machine; the run's config.toml says which.
    `parallel`: over several processes: none, ddp (copies), fsdp (shares of everything) or tp (shares of each block); see parallel.py.
    `compile`: the model goes through torch.compile: slower to start, faster from then on.
    `threads`: of the CPU; none = torch's own choice, one a core.
    `flush_denormal`: numbers below float32's normal range count as 0: averages fading that far otherwise slow many CPUs.
    `seed`: of weights, batches and dropout.
    `eval_every`: steps between evaluations, 0 = only at the end.
    `eval_rows`: validation windows of an evaluation under way; the last one takes the whole split.
    `save_every`: steps between checkpoints, 0 = only at the end.
    """

    objective: Objective = "next-token"
    mask_share: float = 0.15
    mean_span: float = 3.0
    steps: int = 2000
    batch_size: int = 12
    accumulation: int = 1
    optimizer: OptimizerKind = "adamw"
    learning_rate: float = 1e-3
    min_learning_rate: float | None = None
    matrix_learning_rate: float = 0.02
    schedule: Schedule = "cosine"
    warmup: int = 100
    decay_share: float = 0.2
    beta1: float = 0.9
    beta2: float = 0.99
    momentum: float = 0.95
    weight_decay: float = 0.1
    matrix_weight_decay: float = 0.0
    clip: float | None = 1.0
    from_pretrained: str | None = None
    freeze: str | None = None
    lora_rank: int | None = None
    lora_alpha: float = 16.0
    lora_targets: str = "attention.query_key_value,attention.output"
    label_smoothing: float = 0.0
    z_loss: float = 0.0
    ema: float | None = None
    patience: int | None = None
    recompute: Recompute = "none"
    precision: Precision = "auto"
    parallel: Parallel = "none"
    compile: bool = False
    threads: int | None = None
    flush_denormal: bool = True
    seed: int = 1337
    eval_every: int = 250
    eval_rows: int = 240
    save_every: int = 500

    def __post_init__(self) -> None:
        for field in ("steps", "batch_size", "accumulation", "eval_rows"):
            demand(field, getattr(self, field), is_count(getattr(self, field)), "an integer of at least 1")
        for field in ("warmup", "eval_every", "save_every", "seed"):
            demand(field, getattr(self, field), is_count(getattr(self, field), 0), "an integer of at least 0")
        for field in ("patience", "threads", "lora_rank"):
            value = getattr(self, field)
            demand(field, value, value is None or is_count(value), "None or an integer of at least 1")
        for field in ("from_pretrained", "freeze"):
            value = getattr(self, field)
            demand(field, value, value is None or (isinstance(value, str) and bool(value)), "None or a text that is not empty")
        targets = self.lora_targets
        demand("lora_targets", targets, isinstance(targets, str) and bool(targets), "names of layers between commas")
        for field in ("learning_rate", "matrix_learning_rate", "lora_alpha"):
            value = getattr(self, field)
            demand(field, value, is_number(value) and value > 0, "above 0 and finite")
        floor = self.min_learning_rate
        below = floor is None or (is_number(floor) and 0 <= floor <= self.learning_rate)
        demand("min_learning_rate", floor, below, f"None or from 0 to learning_rate={self.learning_rate:g}")
        for field in ("beta1", "beta2", "momentum", "label_smoothing"):
            value = getattr(self, field)
            demand(field, value, is_number(value) and 0 <= value < 1, "at least 0 and below 1")
        demand("decay_share", self.decay_share, is_number(self.decay_share) and 0 < self.decay_share <= 1, "above 0 and at most 1")
        for field in ("weight_decay", "matrix_weight_decay", "z_loss"):
            value = getattr(self, field)
            demand(field, value, is_number(value) and value >= 0, "at least 0 and finite")
        demand("clip", self.clip, self.clip is None or (is_number(self.clip) and self.clip > 0), "None or above 0 and finite")
        demand("ema", self.ema, self.ema is None or (is_number(self.ema) and 0 < self.ema < 1), "None or above 0 and below 1")
        demand("mask_share", self.mask_share, is_number(self.mask_share) and 0 < self.mask_share < 1, "above 0 and below 1")
        demand("mean_span", self.mean_span, is_number(self.mean_span) and self.mean_span >= 1, "at least 1 and finite")
        for field, kind in (
            ("objective", Objective),
            ("optimizer", OptimizerKind),
            ("schedule", Schedule),
            ("recompute", Recompute),
            ("precision", Precision),
            ("parallel", Parallel),
        ):
            demand(field, getattr(self, field), getattr(self, field) in get_args(kind), f"one of {', '.join(get_args(kind))}")
        for field in ("compile", "flush_denormal"):
            demand(field, getattr(self, field), isinstance(getattr(self, field), bool), "True or False")
        scalable = self.parallel != "tp" or self.precision != "fp16"  # torch's scaler takes no mix of whole and divided gradients
        demand("parallel", self.parallel, scalable, "none, ddp or fsdp with precision fp16; tp goes with bf16 and fp32")
        watched = self.patience is None or self.eval_every > 0
        demand("patience", self.patience, watched, "None where eval_every is 0: without evaluations nothing can be waited for")

    @property
    def floor(self) -> float:
        """The learning rate at the end."""
        return self.learning_rate / 10 if self.min_learning_rate is None else self.min_learning_rate


def listed(words: str) -> list[str]:
    """The words between the commas."""
    return [word.strip() for word in words.split(",") if word.strip()]
