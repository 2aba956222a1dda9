"""Speech-like recognition: tone sequences, a log-mel-like front end inside the model, convolution, transformer encoder and CTC."""

import argparse
import math
import random
from dataclasses import dataclass

import torch
from torch import nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, Dataset

CHARS = 10  # 1..10; 0 is the CTC blank


@dataclass
class Config:
    fault: str = "none"
    steps: int = 60
    batch: int = 12
    dim: int = 48
    layers: int = 2
    frame: int = 32
    lr: float = 2e-3


class Tones(Dataset):
    """Utterances: each character is a tone of 2 to 4 frames in noise."""

    def __init__(self, cfg, size=600, seed=0):
        rng = random.Random(seed)
        gen = torch.Generator().manual_seed(seed)
        self.items = []
        for number in range(size):
            text = [rng.randint(1, CHARS) for _ in range(rng.randint(4, 9))]
            pieces = []
            for char in text:
                length = cfg.frame * rng.randint(3, 5) * 2
                time = torch.arange(length) / cfg.frame
                pieces.append(torch.sin(2 * math.pi * time * char * 1.3) + 0.1 * torch.randn(length, generator=gen))
            wave = torch.cat(pieces)
            if cfg.fault in ("silence", "logmel", "quiet") and number % 97 == 50:
                wave = torch.zeros_like(wave)  # a muted microphone
            if cfg.fault in ("short", "shortskipped") and number % 50 == 20:
                wave = wave[: cfg.frame * 4]
            if cfg.fault == "silence":
                wave = (wave - wave.mean()) / wave.std()
            else:
                wave = (wave - wave.mean()) / (wave.std() + 1e-5)
            self.items.append((wave, torch.tensor(text)))

    def __len__(self):
        return len(self.items)

    def __getitem__(self, index):
        return self.items[index]


def collate(items):
    waves, texts = zip(*items)
    return (
        nn.utils.rnn.pad_sequence(waves, batch_first=True),
        torch.tensor([len(w) for w in waves]),
        nn.utils.rnn.pad_sequence(texts, batch_first=True),
        torch.tensor([len(t) for t in texts]),
    )


class FrontEnd(nn.Module):
    def __init__(self, cfg):
        super().__init__()
        self.cfg = cfg
        self.register_buffer("window", torch.hann_window(cfg.frame))

    def forward(self, wave):
        pad = -wave.shape[1] % self.cfg.frame
        frames = F.pad(wave, (0, pad)).unflatten(1, (-1, self.cfg.frame)) * self.window
        power = torch.fft.rfft(frames).abs().square()
        if self.cfg.fault == "logmel":
            return power.log()
        return power.clamp(min=1e-4).log() / 4


class Recogniser(nn.Module):
    def __init__(self, cfg):
        super().__init__()
        self.cfg = cfg
        self.front = FrontEnd(cfg)
        self.conv = nn.Conv1d(cfg.frame // 2 + 1, cfg.dim, 2, stride=2)
        layer = nn.TransformerEncoderLayer(cfg.dim, 4, cfg.dim * 3, 0.1, activation="gelu", batch_first=True, norm_first=True)
        self.encoder = nn.TransformerEncoder(layer, cfg.layers, enable_nested_tensor=False)
        self.norm = nn.LayerNorm(cfg.dim)
        self.head = nn.Linear(cfg.dim, CHARS + 1)

    def forward(self, wave, lengths):
        spectrum = self.front(wave)
        frames = torch.div(lengths, self.cfg.frame, rounding_mode="floor")
        beyond = torch.arange(spectrum.shape[1]) >= frames[:, None]
        x = spectrum.masked_fill(beyond[..., None], 0.0).transpose(1, 2)
        x = self.conv(F.pad(x, (0, x.shape[2] % 2)))
        if self.cfg.fault == "timebatch":
            x = x.reshape(x.shape[0], x.shape[2], x.shape[1]).reshape(x.shape[2], x.shape[0], -1).transpose(0, 1)
        else:
            x = x.transpose(1, 2)
        steps = frames // 2
        position = torch.arange(x.shape[1])[:, None] / torch.logspace(0, 3, self.cfg.dim // 2)
        x = x + torch.cat([position.sin(), position.cos()], 1)
        padding = torch.arange(x.shape[1]) >= steps[:, None]
        if self.cfg.fault == "padframes":
            x = self.encoder(x)
        else:
            x = self.encoder(x, src_key_padding_mask=padding)
        return self.head(self.norm(x)).log_softmax(-1), steps


class Trainer:
    def __init__(self, cfg):
        self.cfg = cfg
        self.model = Recogniser(cfg)
        self.data = DataLoader(Tones(cfg), cfg.batch, shuffle=True, collate_fn=collate, drop_last=True)
        self.valid = DataLoader(Tones(Config(), 60, seed=1), 30, collate_fn=collate)
        self.loss = nn.CTCLoss(zero_infinity=cfg.fault != "short")
        self.opt = torch.optim.AdamW(self.model.parameters(), cfg.lr)
        self.sched = torch.optim.lr_scheduler.OneCycleLR(self.opt, cfg.lr, total_steps=cfg.steps)

    def batch_loss(self, batch):
        wave, lengths, text, text_lengths = batch
        out, steps = self.model(wave, lengths)
        return self.loss(out.transpose(0, 1), text, steps, text_lengths)

    @torch.no_grad()
    def validate(self):
        self.model.eval()
        total = sum(self.batch_loss(batch).item() for batch in self.valid) / len(self.valid)
        self.model.train()
        return total

    def fit(self):
        done = 0
        while done < self.cfg.steps:
            for batch in self.data:
                self.opt.zero_grad(set_to_none=True)
                loss = self.batch_loss(batch)
                loss.backward()
                nn.utils.clip_grad_norm_(self.model.parameters(), 5.0)
                self.opt.step()
                self.sched.step()
                done += 1
                if done % 20 == 0:
                    print(f"{done}: {loss.item():.3f} valid {self.validate():.3f}")
                if done == self.cfg.steps:
                    return


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("--fault", default="none")
    torch.manual_seed(1)
    torch.set_num_threads(1)
    Trainer(Config(fault=parser.parse_args().fault)).fit()
