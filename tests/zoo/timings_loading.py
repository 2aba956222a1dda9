"""A next-character model fed in one of several ways; `--feed` names the way, most of them quick, some of them slow."""

import argparse
import hashlib
import queue
import random
import threading
import time

import torch
from torch import nn
from torch.nn.functional import cross_entropy
from torch.utils.data import DataLoader, Dataset, IterableDataset, TensorDataset

parser = argparse.ArgumentParser()
parser.add_argument("--feed", required=True)
parser.add_argument("--steps", type=int, default=40)
parser.add_argument("--width", type=int, default=64)
parser.add_argument("--rows", type=int, default=32)
args = parser.parse_args()
torch.manual_seed(3)
random.seed(3)
FEED, LENGTH = args.feed, 32
TEXT = "".join(random.choice(["the cat ", "sat on ", "a red mat ", "and ate ", "one fish. "]) for _ in range(20_000))
LETTERS = sorted(set(TEXT))
IDS = torch.tensor([LETTERS.index(letter) for letter in TEXT])


def window(at):
    return IDS[at : at + LENGTH], IDS[at + 1 : at + LENGTH + 1]


def dig(rounds):
    """Some work of the interpreter's, about a microsecond each round."""
    for number in range(rounds):
        hashlib.sha256(str(number).encode()).digest()


class Windows(Dataset):
    """Crops of the text, made when they are asked for."""

    def __len__(self):
        return args.rows * args.steps * 2

    def __getitem__(self, index):
        if FEED == "slow-items":
            dig(600)
        elif FEED in ("slow-disk", "workers-slow-disk"):
            time.sleep(0.002 if FEED == "slow-disk" else 0.006)
        elif FEED == "workers-slow-items":
            dig(12_000)
        return window(random.randrange(len(IDS) - LENGTH - 1))


class Stream(IterableDataset):
    def __iter__(self):
        place = random.Random(torch.utils.data.get_worker_info().id if torch.utils.data.get_worker_info() else 0)
        while True:
            if FEED == "stream-stalls":
                time.sleep(0.002)
            yield window(place.randrange(len(IDS) - LENGTH - 1))


def ahead(batches, depth=4):
    """The same batches, made by a thread meanwhile."""
    made = queue.Queue(depth)

    def work():
        for batch in batches:
            made.put(batch)

    threading.Thread(target=work, daemon=True).start()
    while True:
        yield made.get()


def crops():
    while True:
        if FEED == "thread-slow":
            time.sleep(0.06)
        places = torch.randint(len(IDS) - LENGTH - 1, (args.rows,))
        yield torch.stack([IDS[p : p + LENGTH] for p in places]), torch.stack([IDS[p + 1 : p + LENGTH + 1] for p in places])


def feed():
    rows, shuffled = args.rows, {"shuffle": True, "drop_last": True}
    if FEED == "tensors":
        places = torch.randint(len(IDS) - LENGTH - 1, (rows * args.steps * 2,))
        data = TensorDataset(torch.stack([IDS[p : p + LENGTH] for p in places]), torch.stack([IDS[p + 1 : p + LENGTH + 1] for p in places]))
        return DataLoader(data, rows, **shuffled)
    if FEED == "list":
        return DataLoader([window(random.randrange(len(IDS) - LENGTH - 1)) for _ in range(rows * args.steps * 2)], rows, **shuffled)
    if FEED in ("stream", "stream-stalls"):
        return DataLoader(Stream(), rows)
    if FEED == "stream-workers":
        return DataLoader(Stream(), rows, num_workers=2)
    if FEED.startswith("workers"):
        return DataLoader(Windows(), rows, num_workers=2, **shuffled)
    if FEED.startswith("thread"):
        return ahead(crops())
    if FEED == "crops":
        return crops()
    return DataLoader(Windows(), rows, **shuffled)


class Letters(nn.Module):
    def __init__(self):
        super().__init__()
        self.table = nn.Embedding(len(LETTERS), args.width)
        self.places = nn.Parameter(0.02 * torch.randn(LENGTH, args.width))
        layer = nn.TransformerEncoderLayer(args.width, 4, 4 * args.width, dropout=0.0, batch_first=True, norm_first=True)
        self.blocks = nn.TransformerEncoder(layer, 2, nn.LayerNorm(args.width), enable_nested_tensor=False)
        self.out = nn.Linear(args.width, len(LETTERS))

    def forward(self, ids):
        mask = nn.Transformer.generate_square_subsequent_mask(ids.shape[1])
        return self.out(self.blocks(self.table(ids) + self.places, mask=mask, is_causal=True))


net = Letters()
adam = torch.optim.AdamW(net.parameters(), lr=1e-3)
for step, (inputs, targets) in enumerate(feed()):
    loss = cross_entropy(net(inputs).flatten(0, 1), targets.flatten())
    adam.zero_grad()
    loss.backward()
    adam.step()
    if step % 10 == 0:
        print(step, loss.item())
    if step + 1 == args.steps:
        break
