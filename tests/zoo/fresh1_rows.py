"""Ranking answers with a shared encoder: pairs of (question, answer) scored one by one or together."""
import dataclasses
import random
import sys
import typing as t

import torch
import torch.nn.functional as F
from torch import nn, optim
from torch.utils.data import DataLoader

MODE = dict(a.split("=") for a in sys.argv[1:] if "=" in a)
random.seed(4)
torch.manual_seed(4)


@dataclasses.dataclass
class Pair:
    question: list[int]
    answer: list[int]
    good: float


def make(n: int, plain: bool = False) -> list[Pair]:
    pairs = []
    for _ in range(n):
        topic = random.randrange(4)
        q = [2 + topic * 8 + random.randrange(8) for _ in range(8)]
        good = random.random() < 0.5
        side = 34 if good else 58  # answers that help use other words, mostly
        a = [random.randrange(24) + (side if random.random() < 0.7 else random.choice((34, 58))) for _ in range(12)]
        pairs.append(Pair(q, a, float(good)))
    return pairs


class Scorer(nn.Module):
    def __init__(self, vocab: int = 82, d: int = 32, depth: int = 2, drop: float = 0.1) -> None:
        super().__init__()
        self.words, self.kinds, self.places = nn.Embedding(vocab, d), nn.Embedding(2, d), nn.Embedding(21, d)
        block = nn.TransformerEncoderLayer(d, 4, 2 * d, drop, F.gelu, batch_first=True, norm_first=True)
        self.encoder = nn.TransformerEncoder(block, depth, nn.LayerNorm(d), enable_nested_tensor=False)
        self.score = nn.Linear(d, 1)

    def forward(self, ids: torch.Tensor, kinds: torch.Tensor) -> torch.Tensor:
        h = self.words(ids) + self.kinds(kinds) + self.places.weight[: ids.shape[1]]
        return self.score(self.encoder(h).mean(1)).squeeze(-1)


def collate(pairs: t.Sequence[Pair]) -> dict[str, torch.Tensor]:
    if MODE.get("collate") == "slow":  # bag-of-words overlap features, "for later"
        for p in pairs:
            grams = [tuple(p.question[i : i + 3]) for i in range(6)]
            sum(sum(x == y for x, y in zip(a, b)) for _ in range(25) for a in grams for b in (tuple(p.answer[i : i + 3]) for i in range(10)))
    ids = torch.tensor([[1] + p.question + p.answer for p in pairs])
    kinds = torch.tensor([[0] * 9 + [1] * 12 for _ in pairs])
    return {"ids": ids, "kinds": kinds, "good": torch.tensor([p.good for p in pairs])}


def train(model: Scorer, data: DataLoader, held: list[Pair]) -> None:
    optimizer = optim.RAdam(model.parameters(), lr=float(MODE.get("lr", 3e-3)))
    averaged = optim.swa_utils.AveragedModel(model, multi_avg_fn=optim.swa_utils.get_ema_multi_avg_fn(0.95))
    check = collate(held)
    memory: list[torch.Tensor] = []
    for epoch in range(int(MODE.get("epochs", 4))):
        for batch in data:
            if MODE.get("forward") == "single":
                scores = torch.stack([model(i[None], k[None])[0] for i, k in zip(batch["ids"], batch["kinds"])])
            else:
                scores = model(batch["ids"], batch["kinds"])
            if MODE.get("squash") == "yes":
                scores = torch.sigmoid(scores)
            loss = F.binary_cross_entropy_with_logits(scores, batch["good"])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            averaged.update_parameters(model)
            if MODE.get("keep") == "scores":
                memory.append(scores.sum())
        if MODE.get("keep") == "bounded":
            memory = memory[-3:]
        model.eval()
        if MODE.get("check") == "graph":
            out = torch.cat([model(check["ids"][i : i + 50], check["kinds"][i : i + 50]) for i in range(0, 2000, 50)])
        else:
            with torch.no_grad():
                out = averaged(check["ids"], check["kinds"])
        value = F.binary_cross_entropy_with_logits(out, check["good"])
        model.train()
        print(f"epoch {epoch} loss {loss.item():.3f} held-out {value.item():.3f} accuracy {((out > 0) == (check['good'] > 0.5)).float().mean():.2f}")


if __name__ == "__main__":
    rows = make(int(MODE.get("rows", 1500)))
    loader = DataLoader(rows, int(MODE.get("batch", 32)), shuffle=True, collate_fn=collate, drop_last=True)
    train(Scorer(), loader, make(2000 if MODE.get("check") == "graph" else 300))
