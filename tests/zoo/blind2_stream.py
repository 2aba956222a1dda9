"""Sentences streamed from an IterableDataset with two workers, tokenised on the fly with a regular expression; a GRU language model."""

import re
import sys
from pathlib import Path

import torch
from torch import nn
from torch.utils.data import DataLoader, IterableDataset, get_worker_info

HOW = sys.argv[1] if len(sys.argv) > 1 else "fine"
torch.manual_seed(12)
torch.set_num_threads(1)
PATH = Path(__file__).parents[2] / "examples/data/tinyshakespeare.txt"
pattern = re.compile(r"[a-z]+|[.,;:?!]")
counts = {}
for w in pattern.findall(PATH.read_text()[:300_000].lower()):
    counts[w] = counts.get(w, 0) + 1
itos = ["<pad>", "<unk>", "<s>", "</s>", *sorted(counts, key=counts.get, reverse=True)[:600]]
stoi = {w: i for i, w in enumerate(itos)}


def edit_distance(a, b):
    row = list(range(len(b) + 1))
    for i, x in enumerate(a, 1):
        last, row[0] = row[0], i
        for j, y in enumerate(b, 1):
            last, row[j] = row[j], min(row[j] + 1, row[j - 1] + 1, last + (x != y))
    return row[-1]


class Lines(IterableDataset):
    def __iter__(self):
        info = get_worker_info()
        with PATH.open() as f:
            for n, line in enumerate(f):
                if info is not None and HOW != "copies" and n % info.num_workers != info.id:
                    continue
                tokens = pattern.findall(line.lower())
                if len(tokens) < 4:
                    continue
                if HOW == "slow":  # the nearest known word for a word that is not known
                    tokens = [t if t in stoi else min(itos[4:90], key=lambda w: edit_distance(t, w)) for t in tokens]
                yield [2] + [stoi.get(t, 1) for t in tokens[:24]] + [3]


def collate(rows):
    width = max(map(len, rows))
    return torch.tensor([r + [0] * (width - len(r)) for r in rows])


class GRULM(nn.Module):
    def __init__(self):
        super().__init__()
        self.embed = nn.Embedding(len(itos), 64, padding_idx=0)
        self.rnn = nn.GRU(64, 96, batch_first=True)
        self.out = nn.Linear(96, len(itos))

    def forward(self, x):
        return self.out(self.rnn(self.embed(x))[0])


def main():
    model = GRULM()
    opt = torch.optim.Adam(model.parameters(), 3e-3)
    loader = DataLoader(Lines(), batch_size=32, collate_fn=collate, num_workers=0 if HOW == "slow" else 2)
    for i, batch in enumerate(loader):
        logits = model(batch[:, :-1])
        loss = nn.functional.cross_entropy(logits.flatten(0, 1), batch[:, 1:].flatten(), ignore_index=0)
        opt.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        opt.step()
        if i % 20 == 0:
            print(i, round(loss.item(), 3), flush=True)
        if i == 120:
            break


if __name__ == "__main__":
    main()
