"""A character model on several ranks, windows at random positions: DistributedDataParallel, averaging by hand, local steps."""

import os
import sys

import torch
import torch.distributed as dist
from torch import nn
from torch._utils import _flatten_dense_tensors, _unflatten_dense_tensors
from torch.nn.parallel import DistributedDataParallel

how = sys.argv[1] if len(sys.argv) > 1 else "ddp"
dist.init_process_group("gloo")
rank, world = dist.get_rank(), dist.get_world_size()
torch.set_num_threads(1)
text = open(__file__, encoding="utf-8").read() * 3
chars = sorted(set(text))
ids = torch.tensor([chars.index(c) for c in text])
width, block, batch = 48, 24, 16


class CharModel(nn.Module):
    def __init__(self):
        super().__init__()
        self.embed = nn.Embedding(len(chars), width)
        self.rnn = nn.GRU(width, width, batch_first=True)
        self.out = nn.Linear(width, len(chars))

    def forward(self, x, y):
        h, _ = self.rnn(self.embed(x))
        return nn.functional.cross_entropy(self.out(h).reshape(-1, len(chars)), y.reshape(-1))


torch.manual_seed(7 if how != "unseeded" else 7 + rank)
core = CharModel()
if how == "broadcast":
    torch.manual_seed(70 + rank)
    core = CharModel()
    for tensor in core.state_dict().values():
        dist.broadcast(tensor, 0)
by_hand = how in ("flat", "broadcast", "some", "unseeded")
model = core if by_hand or how in ("local", "alone") else DistributedDataParallel(core)
if how == "late" and rank == 0:  # rank 0 alone goes on from "saved" weights, after wrapping
    torch.manual_seed(1)
    core.load_state_dict(CharModel().state_dict())
opt = torch.optim.AdamW(core.parameters(), lr=3e-3)
pick = torch.Generator().manual_seed(1337 + (0 if how == "same" else rank))
for it in range(40):
    at = torch.randint(len(ids) - block - 1, (batch,), generator=pick)
    x = torch.stack([ids[i : i + block] for i in at])
    y = torch.stack([ids[i + 1 : i + block + 1] for i in at])
    loss = (core if how == "bypass" else model)(x, y)
    opt.zero_grad(set_to_none=True)
    loss.backward()
    if by_hand:
        used = [p for p in core.parameters() if how != "some" or p.dim() > 1]
        flat = _flatten_dense_tensors([p.grad for p in used])
        dist.all_reduce(flat)
        for p, g in zip(used, _unflatten_dense_tensors(flat / world, [p.grad for p in used])):
            p.grad.copy_(g)
    torch.nn.utils.clip_grad_norm_(core.parameters(), 1.0)
    opt.step()
    if how == "local" and it % 8 == 7:
        for p in core.parameters():
            dist.all_reduce(p.data)
            p.data /= world
    if it % 10 == 0 and rank == 0:
        print(it, round(loss.item(), 3), flush=True)
dist.barrier()
if os.environ.get("RANK") == "0":
    print("done")
dist.destroy_process_group()
