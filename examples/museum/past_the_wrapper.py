"""The loss is computed through `model.module`: the ranks never exchange a gradient and drift apart.

Three reinforcement-learning trainers wrapped the policy in DistributedDataParallel and then took the forward that the loss depends on from
the wrapped module itself. The hooks that average gradients are armed in the wrapper's forward, so nothing was averaged; each rank trained
its own model on its own share, and only that of rank 0 was saved. No error, no warning. Here the loss is a weighted next-token loss.
Repair: call the wrapper.

Thread: https://github.com/jingyaogong/minimind/issues/853
Condition: rank-desync
Launch: torchrun
"""

import sys
from pathlib import Path

import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel

FIXED = "fixed" in sys.argv[1:]
CONTEXT, DIM, BATCH, STEPS = 32, 40, 8, 40

text = (Path(__file__).resolve().parent.parent / "data" / "tinyshakespeare.txt").read_text()[:100_000]
characters = sorted(set(text))
data = torch.tensor([characters.index(c) for c in text])


class Policy(nn.Module):
    def __init__(self):
        super().__init__()
        self.embed, self.position = nn.Embedding(len(characters), DIM), nn.Embedding(CONTEXT, DIM)
        layer = nn.TransformerEncoderLayer(DIM, 4, 2 * DIM, dropout=0.0, batch_first=True, norm_first=True)
        self.body = nn.TransformerEncoder(layer, 1, norm=nn.LayerNorm(DIM), enable_nested_tensor=False)
        self.lm_head = nn.Linear(DIM, len(characters), bias=False)

    def forward(self, ids):
        mask = nn.Transformer.generate_square_subsequent_mask(ids.shape[1])
        return self.lm_head(self.body(self.embed(ids) + self.position.weight[: ids.shape[1]], mask=mask, is_causal=True))


def log_probabilities(logits, ids):
    return logits[:, :-1].log_softmax(-1).gather(-1, ids[:, 1:].unsqueeze(-1)).squeeze(-1)


dist.init_process_group("gloo")
torch.set_num_threads(1)
torch.manual_seed(42)
model = DistributedDataParallel(Policy())
optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3)
sample = torch.Generator().manual_seed(42 + dist.get_rank())
for step in range(STEPS):
    starts = torch.randint(len(data) - CONTEXT, (BATCH,), generator=sample)
    ids = torch.stack([data[s : s + CONTEXT] for s in starts])
    unwrapped = model.module if isinstance(model, DistributedDataParallel) else model
    logits = model(ids) if FIXED else unwrapped(ids)
    reward = torch.rand(BATCH, 1, generator=sample) + 0.5
    loss = -(reward * log_probabilities(logits, ids)).mean()
    optimizer.zero_grad()
    loss.backward()
    nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    optimizer.step()
    if step % 10 == 9 and dist.get_rank() == 0:
        print(f"step {step + 1}: loss {loss.item():.3f}")
dist.destroy_process_group()
