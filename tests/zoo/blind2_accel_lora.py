"""A Llama with hand-written LoRA adapters under accelerate; rows are packed documents with a block mask; the last cycle is partial."""

import sys
from pathlib import Path

import torch
from accelerate import Accelerator
from torch import nn
from torch.utils.data import DataLoader
from transformers import LlamaConfig, LlamaForCausalLM

what = dict(a.split("=") for a in sys.argv[1:])
torch.manual_seed(21)
torch.set_num_threads(1)
text = (Path(__file__).parents[2] / "examples/data/tinyshakespeare.txt").read_text()
chars = sorted(set(text))
table = {c: i + 1 for i, c in enumerate(chars)}
docs = [d for d in text[:120_000].split("\n\n") if 20 < len(d) < 60]
LENGTH = 64


def pack(documents):
    row, seg, pos = [], [], []
    for n, d in enumerate(documents):
        ids = [0] + [table[c] for c in d]
        room = LENGTH - len(row)
        ids = ids[:room]
        row += ids
        seg += [n] * len(ids)
        pos += range(len(ids))
        if len(row) == LENGTH:
            return row, seg, pos
    return None


rows, i = [], 0
while i + 4 < len(docs) and len(rows) < 208:
    got = pack(docs[i : i + 4])
    if got:
        rows.append(got)
    i += 3


def collate(batch):
    ids, seg, pos = (torch.tensor([b[k] for b in batch]) for k in range(3))
    causal = torch.tril(torch.ones(LENGTH, LENGTH, dtype=torch.bool))
    allowed = causal & (seg[:, :, None] == seg[:, None, :])
    bias = torch.zeros(len(batch), 1, LENGTH, LENGTH).masked_fill(~allowed[:, None], torch.finfo(torch.float32).min)
    labels = ids.clone()
    labels[pos == 0] = -100
    return {"input_ids": ids, "attention_mask": bias, "position_ids": pos, "labels": labels}


class LoRALinear(nn.Module):
    def __init__(self, base, r=4, alpha=8):
        super().__init__()
        self.base = base
        self.A = nn.Parameter(torch.randn(r, base.in_features) / base.in_features**0.5)
        self.B = nn.Parameter(torch.zeros(base.out_features, r))
        self.scaling = alpha / r

    def forward(self, x):
        return self.base(x) + (x @ self.A.T @ self.B.T) * self.scaling


model = LlamaForCausalLM(
    LlamaConfig(
        vocab_size=len(chars) + 1,
        hidden_size=48,
        intermediate_size=96,
        num_hidden_layers=2,
        num_attention_heads=4,
        attn_implementation="eager",
    )
)
for p in model.model.layers.parameters():
    p.requires_grad_(False)
if what.get("opt") == "early":
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=4e-3)
for layer in model.model.layers:
    for name in ("q_proj", "v_proj"):
        setattr(layer.self_attn, name, LoRALinear(getattr(layer.self_attn, name)))
if what.get("opt") != "early":
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=4e-3)
accelerator = Accelerator(cpu=True, gradient_accumulation_steps=4)
loader = DataLoader(rows, batch_size=8, shuffle=True, collate_fn=collate)
scheduler = torch.optim.lr_scheduler.OneCycleLR(optimizer, 4e-3, total_steps=28)
model, optimizer, loader, scheduler = accelerator.prepare(model, optimizer, loader, scheduler)
history = []
for epoch in range(4):
    model.train()
    for batch in loader:
        with accelerator.accumulate(model):
            loss = model(**batch).loss
            accelerator.backward(loss)
            if accelerator.sync_gradients:
                accelerator.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            scheduler.step()
            optimizer.zero_grad()
        history.append(loss.item())
    print(epoch, sum(history[-len(loader) :]) / len(loader))
