"""Half a training, a checkpoint, and the other half from the checkpoint in a new model and optimizer."""

import os
import random
import sys
import tempfile
from pathlib import Path

import torch
import torch.nn as nn

forgotten = sys.argv[1] if len(sys.argv) > 1 else None
torch.set_num_threads(1)
text = (Path(__file__).parents[2] / "examples/data/tinyshakespeare.txt").read_bytes()[:200_000]
stream = torch.frombuffer(bytearray(text), dtype=torch.uint8).long()


class ByteGPT(nn.Module):
    def __init__(self, d=48, n=32):
        super().__init__()
        self.e, self.p = nn.Embedding(128, d), nn.Parameter(torch.zeros(n, d))
        self.body = nn.TransformerEncoder(nn.TransformerEncoderLayer(d, 4, 4 * d, 0.1, batch_first=True, norm_first=True), 2)
        self.ln, self.o = nn.LayerNorm(d), nn.Linear(d, 128)
        self.register_buffer("m", nn.Transformer.generate_square_subsequent_mask(n))

    def forward(self, x):
        return self.o(self.ln(self.body(self.e(x) + self.p[: x.shape[1]], mask=self.m, is_causal=True)))


class Session:
    def __init__(self, file):
        torch.manual_seed(31)
        self.file, self.iteration = file, 0
        self.net = ByteGPT()
        self.opt = torch.optim.AdamW(self.net.parameters(), 2e-3)
        self.sched = torch.optim.lr_scheduler.CosineAnnealingLR(self.opt, 140, 1e-4)
        if os.path.exists(file):
            self.load()

    def save(self):
        torch.save(
            {
                "net": self.net.state_dict(),
                "opt": self.opt.state_dict(),
                "sched": self.sched.state_dict(),
                "iteration": self.iteration,
                "rng": (torch.get_rng_state(), random.getstate()),
            },
            self.file,
        )

    def load(self):
        found = torch.load(self.file, weights_only=False)
        self.net.load_state_dict(found["net"])
        self.iteration = found["iteration"]
        if forgotten != "weights":
            self.opt.load_state_dict(found["opt"])
            self.sched.load_state_dict(found["sched"])
            torch.set_rng_state(found["rng"][0])
            random.setstate(found["rng"][1])

    def go(self, until):
        self.net.train()
        while self.iteration < until:
            i = torch.randint(len(stream) - 33, (16,))
            rows = torch.stack([stream[j : j + 33] for j in i])
            loss = nn.functional.cross_entropy(self.net(rows[:, :-1]).reshape(-1, 128), rows[:, 1:].reshape(-1))
            self.opt.zero_grad()
            loss.backward()
            self.opt.step()
            self.sched.step()
            self.iteration += 1
            if self.iteration % 35 == 0:
                print(self.iteration, loss.item(), self.sched.get_last_lr())
        self.save()


with tempfile.TemporaryDirectory() as folder:
    file = os.path.join(folder, "last.pt")
    Session(file).go(70)
    Session(file).go(140)
