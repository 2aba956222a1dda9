"""Two gloo processes, bf16 autocast, no_sync accumulation with a remainder at the end of each epoch."""
import contextlib
import os
import sys

import torch
import torch.distributed as dist
import torch.nn as nn
import torch.nn.functional as F
from torch.nn.parallel import DistributedDataParallel as DDP
from torch.utils.data import DataLoader, DistributedSampler, TensorDataset


class Gpt(nn.Module):
    def __init__(self, leak, v=40, d=32):
        super().__init__()
        self.leak = leak
        self.te, self.pe = nn.Embedding(v, d), nn.Embedding(16, d)
        self.blocks = nn.ModuleList(nn.TransformerEncoderLayer(d, 2, 64, 0.1, "gelu", batch_first=True, norm_first=True) for _ in range(2))
        self.ln, self.head = nn.LayerNorm(d), nn.Linear(d, v)

    def forward(self, x, y=None):
        t = x.shape[1]
        mask = None if self.leak else torch.triu(torch.full((t, t), float("-inf")), diagonal=1)
        h = self.te(x) + self.pe(torch.arange(t))
        for b in self.blocks:
            h = b(h, src_mask=mask)
        logits = self.head(self.ln(h))
        return logits, (F.cross_entropy(logits.flatten(0, 1).float(), y.flatten()) if y is not None else None)


def main():
    torch.set_num_threads(1)
    fault = sys.argv[1] if len(sys.argv) > 1 else ""
    if "RANK" in os.environ:
        dist.init_process_group("gloo")
    torch.manual_seed(0)
    starts = torch.randint(0, 40, (200, 1))
    data = (starts + torch.randint(1, 4, (200, 1)) * torch.arange(17)) % 40
    model = Gpt(fault == "leak")
    if dist.is_initialized():
        model = DDP(model)
    opt = torch.optim.AdamW(model.parameters(), lr=1e-3)
    ds = TensorDataset(data[:, :-1], data[:, 1:])
    sampler = DistributedSampler(ds) if dist.is_initialized() else None
    loader = DataLoader(ds, 8, sampler=sampler, shuffle=sampler is None, drop_last=True)
    for epoch in range(2):
        if sampler is not None:
            sampler.set_epoch(epoch)
        micro = list(loader)
        for i, (x, y) in enumerate(micro):
            last = (i + 1) % 5 == 0 or i + 1 == len(micro)
            size = 5 if i < len(micro) // 5 * 5 else len(micro) % 5
            sync = contextlib.nullcontext() if last or not dist.is_initialized() else model.no_sync()
            with sync, torch.autocast("cpu", dtype=torch.bfloat16):
                loss = model(x, y)[1]
                (loss / size).backward()
            if last:
                if fault != "nostep":
                    opt.step()
                opt.zero_grad()
        print(epoch, loss.item(), flush=True)
    if dist.is_initialized():
        dist.destroy_process_group()


main()
