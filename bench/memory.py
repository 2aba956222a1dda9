"""Holds the memory that `sickbay plan` predicts for a training step against what the allocator hands out.

    python bench/memory.py [--write]

Measured: the most bytes that torch's CPU allocator had handed out at once, from the profiler's record of every allocation and release
in the third step of a real AdamW training, plus weights and optimizer state that stood before it. Predicted: by the arithmetic of
core/plan.py from tensors without storage; nothing is fitted.
"""

from __future__ import annotations

import argparse
import gc
import sys
from collections.abc import Callable
from typing import Any

import torch
from results import conditions, put, table
from torch import nn

from sickbay.core.plan import gibibytes
from sickbay.exams.footprint import kept_by, parts_of, without_memory
from sickbay.reference.models.config import Config
from sickbay.reference.models.encoder_decoder import EncoderDecoder
from sickbay.reference.models.model import Transformer

Build = Callable[[], nn.Module]


def gpt2() -> nn.Module:
    from transformers import GPT2Config, GPT2LMHeadModel

    return GPT2LMHeadModel(GPT2Config(vocab_size=2000, n_embd=128, n_layer=4, n_head=4, n_positions=128, bos_token_id=0, eos_token_id=1))


def llama() -> nn.Module:
    from transformers import LlamaConfig, LlamaForCausalLM

    sizes = {"hidden_size": 128, "intermediate_size": 344, "num_hidden_layers": 4, "num_attention_heads": 4, "num_key_value_heads": 2}
    return LlamaForCausalLM(LlamaConfig(vocab_size=2000, max_position_embeddings=128, use_cache=False, **sizes))


def neox() -> nn.Module:
    from transformers import GPTNeoXConfig, GPTNeoXForCausalLM

    sizes = {"hidden_size": 128, "intermediate_size": 512, "num_hidden_layers": 4, "num_attention_heads": 4}
    return GPTNeoXForCausalLM(GPTNeoXConfig(vocab_size=2000, max_position_embeddings=128, use_cache=False, **sizes))


def wide_vocabulary() -> nn.Module:
    return Transformer(Config(dim=64, num_layers=2, num_heads=4, vocab_size=20_000, context=128))


def reference() -> nn.Module:
    return Transformer(Config(dim=128, num_layers=6, num_heads=4, vocab_size=500, context=128))


def swiglu() -> nn.Module:
    return Transformer(Config(dim=128, num_layers=4, num_heads=4, vocab_size=500, context=128, activation="swiglu", tied_embeddings=False))


def heavy() -> nn.Module:
    return Transformer(Config(dim=512, num_layers=4, num_heads=8, vocab_size=500, context=128))


def encoder_decoder() -> nn.Module:
    return EncoderDecoder(Config(dim=128, num_layers=3, num_heads=4, vocab_size=500, context=128))


def t5() -> nn.Module:
    from transformers import T5Config, T5ForConditionalGeneration

    sizes = {"d_model": 128, "d_kv": 32, "d_ff": 512, "num_layers": 3, "num_heads": 4}
    return T5ForConditionalGeneration(T5Config(vocab_size=2000, decoder_start_token_id=0, **sizes))


CASES: tuple[tuple[str, Build, int, int], ...] = (
    ("GPT-2 (transformers), 4 x 128", gpt2, 16, 128),
    ("Llama (transformers), 4 x 128, grouped keys", llama, 16, 128),
    ("GPT-NeoX (transformers), 4 x 128", neox, 16, 128),
    ("reference, 6 x 128", reference, 32, 128),
    ("reference, 4 x 128, SwiGLU, untied", swiglu, 32, 128),
    ("reference, vocabulary 20,000", wide_vocabulary, 8, 128),
    ("reference, 4 x 512, two rows (weights dominate)", heavy, 2, 128),
    ("reference, encoder-decoder, 3 + 3 x 128", encoder_decoder, 16, 128),
    ("T5 (transformers), 3 + 3 x 128", t5, 16, 128),
)


def loss_of(model: nn.Module, ids: torch.Tensor) -> Any:
    """The model's outputs with the loss last."""
    if isinstance(model, (Transformer, EncoderDecoder)):
        logits = model(ids, ids) if isinstance(model, EncoderDecoder) else model(ids)
        return logits, nn.functional.cross_entropy(logits.reshape(-1, logits.shape[-1]), ids.reshape(-1))
    outputs = model(input_ids=ids, labels=ids)
    return outputs.logits, outputs.loss


def predicted(build: Build, rows: int, length: int) -> float:
    with without_memory():
        model = build().train()
        ids = torch.zeros(rows, length, dtype=torch.int64)
        return parts_of(model, kept_by(model, lambda: loss_of(model, ids)), rows).peak


def measured(build: Build, rows: int, length: int) -> float:
    torch.manual_seed(0)
    model = build().train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4)
    ids = torch.randint(0, 500, (rows, length))

    def step() -> None:
        _logits, loss = loss_of(model, ids)  # a name, since the logits live through backward in any loop
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()

    step()
    step()
    optimizer.zero_grad()
    gc.collect()
    standing = sum(t.nbytes for t in (*model.parameters(), *model.buffers()))
    standing += sum(t.nbytes for state in optimizer.state.values() for t in state.values() if isinstance(t, torch.Tensor))
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        step()
    events = sorted(
        (event.start_ns(), event.nbytes())
        for event in profile.profiler.kineto_results.events()  # type: ignore[union-attr]
        if event.name() == "[memory]"
    )
    now = most = 0
    for _, size in events:
        now += size
        most = max(most, now)
    return standing + most


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("--write", action="store_true", help="put the table into RESULTS.md")
    options = parser.parse_args()
    rows, worst = [], 0.0
    for name, build, batch, length in CASES:
        guess, real = predicted(build, batch, length), measured(build, batch, length)
        error = guess / real - 1
        worst = max(worst, abs(error))
        rows.append([name, f"{batch} x {length}", gibibytes(real), gibibytes(guess), f"{error:+.1%}"])
        print("  ".join(rows[-1]), flush=True)
    print(f"largest error {worst:.1%}")
    if options.write:
        heading = ["model", "rows x positions", "measured peak", "predicted peak", "error"]
        text = f"## Memory of a training step, predicted and measured\n\n{table(heading, rows)}\n\nLargest error {worst:.1%}. "
        text += "Measured: peak of the CPU allocator in the third AdamW step (float32). " + conditions()
        put("memory", text)
    return 0 if worst <= 0.1 else 1


if __name__ == "__main__":
    sys.exit(main())
