from dataclasses import dataclass
from typing import Optional
import random, sys
import torch
from torch.utils.data import DataLoader
from transformers import (
    BertConfig,
    BertForMaskedLM,
    RobertaConfig,
    RobertaForMaskedLM,
    DistilBertConfig,
    DistilBertForMaskedLM,
    get_linear_schedule_with_warmup,
)

torch.set_num_threads(1)
PAD, CLS, SEP, MASK, FIRST = 0, 1, 2, 3, 4


@dataclass
class MaskingCollator:
    prob: float = 0.2
    pads_are_labels: bool = False
    mask_nothing_from: Optional[int] = None
    calls: int = 0

    def __call__(self, rows):
        self.calls += 1
        width = max(len(r) for r in rows)
        ids = torch.full((len(rows), width), PAD)
        for i, r in enumerate(rows):
            ids[i, : len(r)] = torch.tensor(r)
        attention = (ids != PAD).long()
        labels = ids.clone()
        chance = torch.full(ids.shape, self.prob)
        chance[ids < FIRST] = 0.0
        if self.mask_nothing_from is not None and self.calls > self.mask_nothing_from:
            chance[:] = 0.0
        picked = torch.bernoulli(chance).bool()
        labels[~picked & ((ids != PAD) | (not self.pads_are_labels))] = -100
        ids[picked & (torch.rand(ids.shape) < 0.8)] = MASK
        return {"input_ids": ids, "attention_mask": attention, "labels": labels}


def sentences(n, rng):
    out = []
    for _ in range(n):
        start, stride = rng.randrange(30), rng.choice([1, 2, 3])
        out.append([CLS] + [FIRST + (start + stride * k) % 40 for k in range(rng.randint(6, 22))] + [SEP])
    return out


def main(kind="bert", fault=""):
    torch.manual_seed(0)
    rng = random.Random(5)
    size = dict(vocab_size=48, hidden_size=48, num_hidden_layers=2, num_attention_heads=4, intermediate_size=96, max_position_embeddings=40)
    if kind == "roberta":
        net = RobertaForMaskedLM(RobertaConfig(**size, pad_token_id=PAD, bos_token_id=CLS, eos_token_id=SEP, type_vocab_size=1))
    elif kind == "distil":
        net = DistilBertForMaskedLM(
            DistilBertConfig(vocab_size=48, dim=48, n_layers=2, n_heads=4, hidden_dim=96, max_position_embeddings=40)
        )
    else:
        net = BertForMaskedLM(BertConfig(**size))
    collate = MaskingCollator(pads_are_labels=fault == "pads", mask_nothing_from=25 if fault == "empty" else None)
    loader = DataLoader(sentences(640, rng), batch_size=16, shuffle=True, collate_fn=collate)
    optim = torch.optim.AdamW(net.parameters(), lr=2e-3)
    sched = get_linear_schedule_with_warmup(optim, 8, 40)
    held_out = [collate(sentences(16, rng)) for _ in range(2)]
    net.eval() if fault == "eval" else net.train()
    for n, batch in enumerate(loader):
        if fault == "nomask":
            batch.pop("attention_mask")
        loss = net(**batch).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(net.parameters(), 1.0)
        optim.step()
        sched.step()
        optim.zero_grad()
        if n % 20 == 19:
            if fault != "noeval":
                net.eval()
            with torch.no_grad():
                v = sum(net(**b).loss.item() for b in held_out) / 2
            print(f"{n} train {loss.item():.3f} held out {v:.3f}")
            if fault != "eval":
                net.train()


main(*sys.argv[1:])
