"""Sequence tagging with an LSTM or a small encoder inside a trainer class with callbacks; --style picks what the classes do."""
import argparse

import torch
from torch import nn
from torch.utils.data import DataLoader, Dataset


class Ticks(Dataset):
    """Windows over a noisy periodic signal; the tag is the phase quadrant. Optionally remembers what it made."""

    def __init__(self, count, remember=False):
        self.count, self.remember, self.made = count, False, {}
        if not remember:
            self.made = {i: self[i] for i in range(count)}
        self.remember = remember

    def __len__(self):
        return self.count

    def __getitem__(self, i):
        if i in self.made:
            return self.made[i]
        g = torch.Generator().manual_seed(i)
        phase = torch.rand(1, generator=g) * 6.28 + torch.arange(64) * 0.2
        item = torch.stack([phase.sin(), phase.cos()], -1) + 0.05 * torch.randn(64, 2, generator=g), (phase % 6.2832 / 1.5708).long().clamp(0, 3)
        if self.remember:
            self.made[i] = item
        return item


class Tagger(nn.Module):
    def __init__(self, width=96):
        super().__init__()
        self.up = nn.Linear(2, width)
        self.rnn = nn.LSTM(width, width, batch_first=True)
        self.mix = nn.Sequential(nn.LayerNorm(width), nn.Linear(width, 2 * width), nn.GELU(), nn.Linear(2 * width, 4))

    def forward(self, x, state=None):
        out, state = self.rnn(self.up(x), state)
        return self.mix(out), state


class Callback:
    def after_step(self, loop, loss, scores):
        pass


class CurveKeeper(Callback):
    def __init__(self, keep_tensor):
        self.keep_tensor = keep_tensor
        self.values = []

    def after_step(self, loop, loss, scores):
        self.values.append(loss if self.keep_tensor else float(loss))


class ConfusionKeeper(Callback):
    """keeps scores for a confusion matrix at the end"""

    def __init__(self, limit=None):
        self.store = {"scores": [], "n": 0}
        self.limit = limit

    def after_step(self, loop, loss, scores):
        self.store["scores"].append(scores)
        self.store["n"] += 1
        if self.limit and len(self.store["scores"]) > self.limit:
            del self.store["scores"][0]


class Loop:
    def __init__(self, model, loader, callbacks=(), carry="fresh", steps=40):
        self.model, self.loader, self.callbacks, self.carry, self.steps = model, loader, list(callbacks), carry, steps
        self.opt = torch.optim.Adam(model.parameters(), lr=3e-3)
        self.lossfn = nn.CrossEntropyLoss()

    def run(self):
        done, state = 0, None
        while done < self.steps:
            for x, y in self.loader:
                if self.carry == "detached" and state is not None:
                    state = tuple(s.detach() for s in state)
                scores, state = self.model(x, state if self.carry != "fresh" else None)
                loss = self.lossfn(scores.flatten(0, 1), y.flatten())
                self.opt.zero_grad(set_to_none=True)
                loss.backward(retain_graph=self.carry == "linked")
                nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
                self.opt.step()
                if self.carry == "linked":  # the values carry on, and so does their history
                    state = tuple((s + 0.0) for s in state)
                for c in self.callbacks:
                    c.after_step(self, loss, scores)
                done += 1
                if done % 10 == 0:
                    print(done, loss.item())
                if done >= self.steps:
                    break


a = argparse.ArgumentParser()
a.add_argument("--style", default="plain")
a = a.parse_args()
torch.manual_seed(1)
loader = DataLoader(Ticks(800, remember=a.style == "remember"), batch_size=16, shuffle=True)
callbacks = {
    "curve": [CurveKeeper(True)],
    "scores": [CurveKeeper(False), ConfusionKeeper()],
    "bounded": [CurveKeeper(False), ConfusionKeeper(limit=5)],
}.get(a.style, [CurveKeeper(False)])
Loop(Tagger(), loader, callbacks, carry={"tbptt": "detached"}.get(a.style, "fresh")).run()
