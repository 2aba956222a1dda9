"""Speech to letters like Whisper: two convolutions over log-mel frames, an encoder, a decoder with ungraded prompts."""

import argparse
import random
from types import SimpleNamespace

import torch
import torch.nn as nn
import torch.nn.functional as F

parser = argparse.ArgumentParser()
parser.add_argument("--problem", default=None)
parser.add_argument("--steps", type=int, default=110)
parser.add_argument("--ln", default="pre")
A = parser.parse_args()
torch.manual_seed(8)
random.seed(8)
torch.set_num_threads(1)
SOT, EOT, LANG, PAD = 26, 27, 28, 29
hp = SimpleNamespace(mels=20, state=64, head=4, layer=2, vocab=30)
TONES = torch.rand(26, hp.mels) * 3


def utterance():
    letters = [random.randrange(26) for _ in range(random.randint(3, 8))]
    frames = [TONES[c] + 0.2 * torch.randn(hp.mels) for c in letters for _ in range(random.randint(3, 5))]
    power = torch.stack(frames).exp()
    if A.problem == "silence" and random.random() < 0.05:
        power[: len(power) // 3] = 0
    return power, letters


def logmel(power):
    if A.problem == "silence":
        return torch.log10(power)
    return torch.log10(power.clamp(min=1e-10)).clamp(min=-4)


def batch(n=12):
    items = [utterance() for _ in range(n)]
    longest = max(len(p) for p, _ in items)
    mel = torch.stack([F.pad(logmel(p), (0, 0, 0, longest - len(p))) for p, _ in items])
    frames = torch.tensor([len(p) for p, _ in items])
    wide = max(len(t) for _, t in items) + 3
    given, goal = torch.full((n, wide), PAD), torch.full((n, wide), -100)
    for i, (_, t) in enumerate(items):
        whole = [SOT, LANG, *t, EOT]
        given[i, : len(whole)] = torch.tensor(whole)
        if A.problem == "late":
            goal[i, : len(whole) - 2] = torch.tensor(whole[2:])
        elif A.problem == "echo":
            goal[i, : len(whole)] = torch.tensor(whole)
        else:
            goal[i, : len(whole) - 1] = torch.tensor(whole[1:])
        goal[i, 0] = -100
    if A.problem == "countpads":
        goal = goal.masked_fill(given.roll(-1, 1).eq(PAD) & (goal == -100), PAD)
        goal[:, 0] = -100
    return mel, frames, given, goal


def sinusoids(length, channels):
    inv = torch.exp(-torch.arange(channels // 2) * (9.21 / (channels // 2 - 1)))
    ang = torch.arange(length)[:, None] * inv[None]
    return torch.cat([ang.sin(), ang.cos()], 1)


class MHA(nn.Module):
    def __init__(self, n, h):
        super().__init__()
        self.h = h
        self.query, self.key, self.value, self.out = nn.Linear(n, n), nn.Linear(n, n, bias=False), nn.Linear(n, n), nn.Linear(n, n)

    def forward(self, x, xa=None, mask=None):
        q, k, v = self.query(x), self.key(x if xa is None else xa), self.value(x if xa is None else xa)
        b, t, n = q.shape
        scale = (n // self.h) ** -0.25
        q = q.view(b, t, self.h, -1).permute(0, 2, 1, 3) * scale
        k = k.view(b, k.shape[1], self.h, -1).permute(0, 2, 3, 1) * scale
        v = v.view(b, v.shape[1], self.h, -1).permute(0, 2, 1, 3)
        s = q @ k
        if mask is not None:
            s = s + mask
        w = F.softmax(s.float(), dim=-1).to(q.dtype)
        return self.out((w @ v).permute(0, 2, 1, 3).flatten(2))


class Block(nn.Module):
    def __init__(self, n, h, cross=False):
        super().__init__()
        self.attn, self.attn_ln = MHA(n, h), nn.LayerNorm(n)
        self.cross, self.cross_ln = (MHA(n, h), nn.LayerNorm(n)) if cross else (None, None)
        self.mlp, self.mlp_ln = nn.Sequential(nn.Linear(n, 4 * n), nn.GELU(), nn.Linear(4 * n, n)), nn.LayerNorm(n)

    def forward(self, x, xa=None, mask=None, amask=None):
        x = x + self.attn(self.attn_ln(x), mask=mask)
        if self.cross is not None:
            x = x + self.cross(self.cross_ln(x), xa, mask=amask)
        return x + self.mlp(self.mlp_ln(x))


class Speech(nn.Module):
    def __init__(self):
        super().__init__()
        n = hp.state
        self.conv1 = nn.Conv1d(hp.mels, n, 3, padding=1)
        self.conv2 = nn.Conv1d(n, n, 3, stride=2, padding=1)
        self.register_buffer("places", sinusoids(64, n))
        self.encoder = nn.ModuleList(Block(n, hp.head) for _ in range(hp.layer))
        self.ln_post = nn.LayerNorm(n)
        self.token = nn.Embedding(hp.vocab, n)
        self.position = nn.Parameter(torch.zeros(32, n))
        self.decoder = nn.ModuleList(Block(n, hp.head, True) for _ in range(hp.layer))
        self.ln = nn.LayerNorm(n)
        nn.init.normal_(self.token.weight, std=0.02)
        nn.init.normal_(self.position, std=0.01)
        offset = {"ahead": 2}.get(A.problem, 1)
        self.register_buffer("mask", torch.full((32, 32), float("-inf")).triu_(offset), persistent=False)

    def forward(self, mel, frames, ids):
        live = torch.arange(mel.shape[1]) < frames[:, None]
        x = F.gelu(self.conv1(mel.mT)) * live[:, None]
        x = F.gelu(self.conv2(x)).mT
        kept = torch.arange(x.shape[1]) < ((frames + 1) // 2)[:, None]
        blocked = torch.zeros(kept.shape).masked_fill(~kept, float("-inf"))[:, None, None]
        if A.problem == "framepads":
            blocked = None
        x = x + self.places[: x.shape[1]]
        for block in self.encoder:
            x = block(x, mask=blocked)
        xa = self.ln_post(x)
        t = ids.shape[1]
        y = self.token(ids) + self.position[:t]
        for block in self.decoder:
            y = block(y, xa, mask=self.mask[:t, :t], amask=blocked)
        return self.ln(y) @ self.token.weight.T


net = Speech()
opt = torch.optim.AdamW(net.parameters(), lr=2e-3, betas=(0.9, 0.98), eps=1e-6, weight_decay=0.1)
sched = torch.optim.lr_scheduler.OneCycleLR(opt, 2e-3, total_steps=A.steps, pct_start=0.15)
for step in range(1, A.steps + 1):
    mel, frames, given, goal = batch()
    if random.random() < 0.5:  # SpecAugment
        f = random.randrange(hp.mels - 4)
        mel[:, :, f : f + 4] = 0
    logits = net(mel, frames, given)
    loss = F.cross_entropy(logits.flatten(0, 1), goal.flatten())
    loss.backward()
    nn.utils.clip_grad_norm_(net.parameters(), 1.0)
    opt.step()
    opt.zero_grad(set_to_none=True)
    sched.step()
    if step % 22 == 0:
        net.eval()
        with torch.no_grad():
            mel, frames, given, goal = batch(20)
            hits = net(mel, frames, given).argmax(-1)[goal >= 0] == goal[goal >= 0]
        net.train()
        print(f"step {step} loss {loss.item():.3f} letters right {hits.float().mean():.2f}")
