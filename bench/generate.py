"""How fast text is written: batch 1, from one token on, random weights, each loop in a process of its own, taking turns.

    python bench/generate.py --nanogpt PATH                 both sizes and the pool (about three minutes on two quiet cores)
    python bench/generate.py --only tiny --tokens 32 --rounds 1
    python bench/generate.py --nanogpt PATH --write         also puts the tables into RESULTS.md

PATH: a folder with nanoGPT's model.py, e.g. of `git clone https://github.com/karpathy/nanoGPT`; left out, so is nanoGPT.
Every loop draws from the whole distribution at temperature 1. Those that read everything again for each token get fewer rounds at
GPT-2's size, where a round takes them minutes.
"""

from __future__ import annotations

import argparse
import contextlib
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from turns import Player, Requests

HERE = Path(__file__).resolve().parent
# layers, heads, width, vocabulary, context
SIZES = {"tiny": (4, 4, 128, 65, 320), "gpt2": (12, 12, 768, 50257, 1024)}
LOOPS = {
    "ours": "ours",
    "ours-fp16": "ours, weights in fp16",
    "transformers": "transformers' generate, with cache",
    "transformers-uncached": "transformers' generate, without cache",
    "nanogpt": "nanoGPT's generate (it has no cache)",
}
WARM = 32  # tokens written before the first round
UNCACHED = ("transformers-uncached", "nanogpt")
PARTS = (*SIZES, "pool")


def writer(name: str, size: str, nanogpt: Path | None) -> Callable[[int], None]:
    """What writes so many tokens with the loop `name`."""
    import torch

    layers, heads, width, vocabulary, context = SIZES[size]
    torch.manual_seed(0)
    if name in ("ours", "ours-fp16"):
        from sickbay.reference.generation.decoding import Decoding
        from sickbay.reference.generation.generate import generate
        from sickbay.reference.models import layout
        from sickbay.reference.models.config import Config
        from sickbay.reference.models.model import Transformer

        shape = Config(
            dim=width, num_layers=layers, num_heads=heads, vocab_size=vocabulary, context=context,
            norm="layernorm", positions="learned", activation="gelu_tanh", bias=True,
        )  # fmt: skip
        # As `sickbay generate` and `sickbay generate --weights fp16` lay the weights out.
        lay_out = layout.lay_out_for_reading if name == "ours" else layout.halve_weights
        ours, decoding, first = Transformer(shape), Decoding(temperature=1.0), torch.zeros(1, 1, dtype=torch.int64)
        lay_out(ours)
        return lambda tokens: [None for _ in generate(ours, first, tokens, decoding)].clear()
    if name == "nanogpt":
        from trainer_loops import load_nanogpt

        assert nanogpt is not None
        module = load_nanogpt(nanogpt)
        shaped = module.GPTConfig(
            n_layer=layers, n_head=heads, n_embd=width, vocab_size=vocabulary, block_size=context, bias=True, dropout=0.0
        )
        theirs: Any = module.GPT(shaped)
        theirs.eval()
        return lambda tokens: theirs.generate(torch.zeros(1, 1, dtype=torch.int64), tokens)
    from transformers import GPT2Config, GPT2LMHeadModel

    settings = GPT2Config(
        vocab_size=vocabulary, n_positions=context, n_embd=width, n_layer=layers, n_head=heads, bos_token_id=0, eos_token_id=None
    )
    model: Any = GPT2LMHeadModel(settings)
    model.eval()
    ids = torch.zeros(1, 1, dtype=torch.int64)

    def write(tokens: int) -> None:
        kept = name == "transformers"
        written = model.generate(
            ids, attention_mask=torch.ones_like(ids), do_sample=True, top_k=0, max_new_tokens=tokens, use_cache=kept, pad_token_id=0
        )
        assert written.shape[1] == tokens + 1

    return write


def serve(name: str, size: str, nanogpt: Path | None) -> None:
    import torch

    requests = Requests()
    write = writer(name, size, nanogpt)
    write(2 if size == "gpt2" and name in UNCACHED else WARM)
    for request in requests:
        began = time.perf_counter()
        with torch.no_grad():
            write(request["tokens"])
        requests.answer(time.perf_counter() - began)


def speeds(size: str, nanogpt: Path | None, tokens: int, rounds: int) -> str:
    """A table of tokens/s; ratios are taken within rounds."""
    names = [name for name in LOOPS if name != "nanogpt" or nanogpt is not None]
    names = [name for name in names if size == "tiny" or name != "transformers-uncached"]
    folder = [] if nanogpt is None else ["--nanogpt", str(nanogpt)]
    taken: dict[str, list[float]] = {name: [] for name in names}
    with contextlib.ExitStack() as stack:
        players = {
            name: stack.enter_context(Player(name, HERE / "generate.py", "--child", name, "--size", size, *folder)) for name in names
        }
        for player in players.values():  # nobody is measured while another still imports its libraries
            player.ask(tokens=2)
        for number in range(rounds):
            for name in names if number % 2 == 0 else names[::-1]:
                if size == "gpt2" and name in UNCACHED and number:
                    continue
                taken[name].append(players[name].ask(tokens=tokens))
                print(f"{size} {number + 1}/{rounds} {name}: {tokens / taken[name][-1]:.1f} tokens/s", file=sys.stderr, flush=True)
    import results

    rows = []
    for name in names:
        rate = tokens / statistics.median(taken[name])
        ratios = sorted(theirs / ours for theirs, ours in zip(taken[name], taken["ours"]))
        spread = f"{statistics.median(ratios):.2f} ({ratios[0]:.2f} to {ratios[-1]:.2f})"
        rows.append([LOOPS[name], f"{rate:.1f}", f"{1000 / rate:.2f} ms", spread, str(len(ratios))])
    layers, _, width, vocabulary, _ = SIZES[size]
    table = results.table(["loop", "tokens/s", "one token", "ours is so many times as fast, median (range)", "rounds"], rows)
    return f"{layers} x {width}, {vocabulary:,} ids, {tokens} new tokens:\n\n{table}"


def pool_benefit(rounds: int) -> str:
    """Buffers made anew against buffers of the pool, in turn: GPT-2's keys and values for 32 tokens, and the logits of an evaluation."""
    import results
    import torch

    from sickbay.reference.training.pool import Pool

    pool = Pool(most_bytes=1 << 30)
    layers, heads, width, vocabulary, context = SIZES["gpt2"]
    cache_shape, logits_shape = (2 * layers, 1, heads, context, width // heads), (256, vocabulary)
    hidden, head = torch.randn(256, width), torch.randn(width, vocabulary)
    new = torch.randn(1, heads, 32, width // heads)

    def fill(cache: Any) -> None:
        for half in cache:
            half[:, :, :32] = new

    def borrowed(shape: tuple[int, ...], work: Callable[[Any], object]) -> None:
        with pool.borrow(shape) as tensor:
            work(tensor)

    def project(logits: Any) -> None:
        torch.mm(hidden, head, out=logits)

    works: dict[str, tuple[tuple[int, ...], Callable[[Any], object]]] = {
        f"a cache of {4 * torch.Size(cache_shape).numel() / 2**20:.0f} MiB, cleared": (cache_shape, lambda cache: cache.zero_()),
        "the same, 32 positions filled": (cache_shape, fill),
        f"logits of {4 * torch.Size(logits_shape).numel() / 2**20:.0f} MiB, multiplied out": (logits_shape, project),
    }
    rows = []
    for told, (shape, work) in works.items():
        fresh, pooled = [], []
        for number in range(rounds + 1):
            began = time.perf_counter()
            work(torch.empty(shape))
            middle = time.perf_counter()
            borrowed(shape, work)
            if number:  # the first fills the pool
                fresh.append(middle - began)
                pooled.append(time.perf_counter() - middle)
        ratios = sorted(one / other for one, other in zip(fresh, pooled))
        rows.append(
            [
                told,
                f"{1000 * statistics.median(fresh):.2f} ms",
                f"{1000 * statistics.median(pooled):.2f} ms",
                f"{statistics.median(ratios):.2f} ({ratios[0]:.2f} to {ratios[-1]:.2f})",
            ]
        )
    seen = pool.statistics
    table = results.table(["work", "fresh buffer", "pool's buffer", "fresh / pool, median (range)"], rows)
    return f"{seen.reused} of {seen.loans} loans were used buffers:\n\n{table}"


def main() -> None:
    args = arguments()
    if args.child:
        serve(args.child, args.size, args.nanogpt)
        return
    import results

    for part in args.only:
        measured = pool_benefit(5 * args.rounds) if part == "pool" else speeds(part, args.nanogpt, args.tokens, args.rounds)
        text = f"{measured}\n\n{results.conditions()}"
        print(f"{part}\n\n{text}\n", flush=True)
        if args.write:
            results.put(f"generate-{part}", f"## Generation: {part}\n\n{text}")


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--nanogpt", type=Path, metavar="PATH", help="a folder with nanoGPT's model.py")
    parser.add_argument("--only", nargs="+", choices=PARTS, default=list(PARTS))
    parser.add_argument("--tokens", type=int, default=256)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--write", action="store_true", help="put the tables into RESULTS.md")
    parser.add_argument("--child", choices=LOOPS, help=argparse.SUPPRESS)
    parser.add_argument("--size", choices=SIZES, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.nanogpt is not None and not (args.nanogpt / "model.py").is_file():
        parser.error(f"{args.nanogpt} has no model.py; `git clone https://github.com/karpathy/nanoGPT` makes such a folder")
    return args


if __name__ == "__main__":
    main()
