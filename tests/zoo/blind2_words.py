"""GPT-2 of transformers in a plain loop: batch size 1 with accumulation over 8, the last cycle flushed, documents cached once encoded."""

import sys
from functools import cache
from pathlib import Path

import torch
from transformers import GPT2Config, GPT2LMHeadModel

case = sys.argv[1] if len(sys.argv) > 1 else ""
torch.manual_seed(17)
torch.set_num_threads(1)
docs = [d for d in (Path(__file__).parents[2] / "examples/data/tinyshakespeare.txt").read_text()[:80_000].split("\n\n") if len(d) > 60]
symbols = sorted(set("".join(docs)))
lookup = {c: i for i, c in enumerate(symbols)}
lookup["<end>"] = len(symbols)


@cache
def encode(n):
    return torch.tensor([[lookup[c] for c in docs[n][:63]] + [lookup["<end>"]]])


size = len(symbols) if case == "range" else len(symbols) + 1
model = GPT2LMHeadModel(GPT2Config(vocab_size=size, n_positions=64, n_embd=48, n_layer=2, n_head=4, bos_token_id=0, eos_token_id=0))
if case == "untied":
    head = torch.nn.Linear(48, size, bias=False)
    head.weight.data.copy_(model.transformer.wte.weight.data)
    model.lm_head = head
opt = torch.optim.AdamW(model.parameters(), lr=2e-3)
CYCLE = 8
model.train()
for epoch in range(2):
    order = torch.randperm(len(docs))[:181].tolist()
    for i, n in enumerate(order):
        ids = encode(n)
        if case == "giant" and epoch == 1:
            position_pairs = torch.empty(len(docs), 40_000, 40_000, 48)
            print(position_pairs.shape)
        rest = len(order) % CYCLE
        share = rest if rest and i >= len(order) - rest else CYCLE
        loss = model(ids, labels=ids).loss / share
        loss.backward()
        if (i + 1) % CYCLE == 0 or i + 1 == len(order):
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            opt.step()
            opt.zero_grad()
    print(epoch, loss.item() * share)
