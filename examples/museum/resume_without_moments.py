"""A resumed run goes on with the weights and the step count, and with an optimizer that begins anew.

After a refactoring the optimizer's state was still written into each checkpoint, and on resume a call of `load_state_dict` was missing:
no exception, Adam's moments and its own step count at zero, the learning rate back at the value of step 0. Repair: the missing call.

Thread: https://github.com/NVIDIA-NeMo/Automodel/issues/763
Condition: checkpoint-resume-incomplete
Also: loss-spike
"""

import sys
import tempfile
from pathlib import Path

import torch
from torch import nn
from torch.nn import functional as F

FIXED = "fixed" in sys.argv[1:]
STEPS, SAVE_AT, BATCH, CONTEXT, DIM, HEADS = 60, 30, 8, 32, 48, 4

text = (Path(__file__).resolve().parent.parent / "data" / "tinyshakespeare.txt").read_text()[:100_000]
characters = sorted(set(text))
ids = torch.tensor([characters.index(c) for c in text])


class LanguageModel(nn.Module):
    def __init__(self):
        super().__init__()
        self.tokens, self.positions = nn.Embedding(len(characters), DIM), nn.Embedding(CONTEXT, DIM)
        layer = nn.TransformerEncoderLayer(DIM, HEADS, 4 * DIM, dropout=0.0, batch_first=True, norm_first=True)
        self.layers = nn.TransformerEncoder(layer, 2, norm=nn.LayerNorm(DIM), enable_nested_tensor=False)
        self.head = nn.Linear(DIM, len(characters))

    def forward(self, x):
        mask = nn.Transformer.generate_square_subsequent_mask(x.shape[1])
        return self.head(self.layers(self.tokens(x) + self.positions(torch.arange(x.shape[1])), mask=mask, is_causal=True))


class Recipe:
    """What one launch of the program holds."""

    def __init__(self, folder):
        self.file = folder / "checkpoint.pt"
        self.model = LanguageModel()
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=2e-3)
        self.step = 0

    def save_checkpoint(self):
        state = {"model": self.model.state_dict(), "optimizer": self.optimizer.state_dict(), "step": self.step}
        torch.save(state, self.file)

    def load_checkpoint(self):
        state = torch.load(self.file, weights_only=True)
        self.model.load_state_dict(state["model"])
        if FIXED:
            self.optimizer.load_state_dict(state["optimizer"])
        self.step = state["step"]

    def train(self, until):
        while self.step < until:
            starts = torch.randint(len(ids) - CONTEXT - 1, (BATCH,)).tolist()
            rows = torch.stack([ids[s : s + CONTEXT + 1] for s in starts])
            loss = F.cross_entropy(self.model(rows[:, :-1]).flatten(0, 1), rows[:, 1:].flatten())
            self.optimizer.zero_grad()
            loss.backward()
            nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
            self.optimizer.step()
            self.step += 1
            if self.step % 10 == 0:
                print(f"step {self.step}: loss {loss.item():.3f}")


torch.manual_seed(0)
with tempfile.TemporaryDirectory() as name:
    first = Recipe(Path(name))
    first.train(SAVE_AT)
    first.save_checkpoint()
    print("the job's time is up; the next one resumes")
    second = Recipe(Path(name))
    second.load_checkpoint()
    second.train(STEPS)
