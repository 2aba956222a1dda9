"""A small language model is trained, stopped and taken up again from its checkpoint file; or the file is put to another use."""
import os
import sys
import tempfile

import torch
import torch.nn as nn
import torch.nn.functional as F

what = sys.argv[1] if len(sys.argv) > 1 else "all"
V, T = 32, 16


class LM(nn.Module):
    def __init__(self, d=32):
        super().__init__()
        self.tok, self.pos = nn.Embedding(V, d), nn.Embedding(T, d)
        self.mix = nn.Conv1d(d, d, 3, padding=2)
        self.norm = nn.LayerNorm(d)
        self.head = nn.Linear(d, V)

    def forward(self, ids):
        h = self.tok(ids) + self.pos.weight
        h = h + F.gelu(self.mix(h.transpose(1, 2))[..., :T].transpose(1, 2))
        return self.head(self.norm(h))


gen = torch.Generator().manual_seed(3)


def batch():
    start = torch.randint(V, (16, 1), generator=gen)
    stride = torch.randint(1, 4, (16, 1), generator=gen)
    ids = (start + stride * torch.arange(T + 1)) % V
    return ids[:, :-1], ids[:, 1:]


class Run:
    def __init__(self, seed=0):
        torch.manual_seed(seed)
        self.model = LM()
        if what == "sgd":
            self.opt = torch.optim.SGD(self.model.parameters(), lr=0.1)
        else:
            self.opt = torch.optim.AdamW(self.model.parameters(), lr=2e-3)
        self.sched = torch.optim.lr_scheduler.LambdaLR(self.opt, lambda s: min(1, (s + 1) / 10))
        self.done = 0

    def steps(self, count):
        for _ in range(count):
            x, y = batch()
            loss = F.cross_entropy(self.model(x).flatten(0, 1), y.flatten())
            self.opt.zero_grad(set_to_none=True)
            loss.backward()
            self.opt.step()
            self.sched.step()
            self.done += 1
            if self.done % 10 == 0:
                print(self.done, round(loss.item(), 4))

    def save(self, path):
        state = {"model": self.model.state_dict(), "global_step": self.done}
        if what != "never-saved":
            state.update(optimizer=self.opt.state_dict(), scheduler=self.sched.state_dict())
        torch.save(state, path)

    def resume(self, path):
        state = torch.load(path, map_location="cpu")
        self.model.load_state_dict(state["model"])
        if what in ("all", "scheduler"):
            self.opt.load_state_dict(state["optimizer"])
        if what in ("all", "optimizer"):
            self.sched.load_state_dict(state["scheduler"])
        elif what in ("sgd", "never-saved"):
            self.sched = torch.optim.lr_scheduler.LambdaLR(self.opt, lambda s: min(1, (s + state["global_step"]) / 10))
            self.sched.last_epoch = state["global_step"]
        if what == "late":  # the restored optimizer is replaced by a new one
            self.opt.load_state_dict(state["optimizer"])
            self.opt = torch.optim.AdamW(self.model.parameters(), lr=2e-3)
            self.sched = torch.optim.lr_scheduler.LambdaLR(self.opt, lambda s: min(1, (s + 1) / 10))
            self.sched.load_state_dict(state["scheduler"])
        self.done = state["global_step"]


with tempfile.TemporaryDirectory() as folder:
    path = os.path.join(folder, "last.pt")
    first = Run()
    first.steps(30)
    first.save(path)
    if what in ("all", "optimizer", "scheduler", "never-saved", "late", "sgd"):
        second = Run(seed=1)
        second.resume(path)
        second.steps(30)
    elif what == "finetune":  # another task on the same weights
        state = torch.load(path)
        tuned = Run(seed=2)
        tuned.model.load_state_dict(state["model"])
        print(f"starting from step {state['global_step']}")
        tuned.steps(30)
    elif what == "best":  # on with the same optimizer from the best weights, and a last look at them
        state = torch.load(path)
        first.model.load_state_dict(state["model"])
        first.done = state["global_step"]
        first.steps(20)
        first.model.load_state_dict(torch.load(path)["model"])
        with torch.no_grad():
            x, y = batch()
            print("val", F.cross_entropy(first.model.eval()(x).flatten(0, 1), y.flatten()).item())
    elif what == "teacher":
        state = torch.load(path)
        teacher = LM()
        teacher.load_state_dict(state["model"])
        age = state["global_step"]
        student = Run(seed=5)
        for _ in range(20):
            x, _ = batch()
            with torch.no_grad():
                wanted = teacher(x).softmax(-1)
            loss = F.cross_entropy(student.model(x).flatten(0, 1), wanted.flatten(0, 1))
            student.opt.zero_grad()
            loss.backward()
            student.opt.step()
            student.sched.step()
        print("student of a teacher of age", age, round(loss.item(), 4))
