# Date normalisation ("3 march 1997" -> "1997-03-03") as character translation. accelerate + torch.nn.Transformer.
import argparse, random
from functools import partial
import torch
from accelerate import Accelerator
from accelerate.utils import set_seed
from torch import nn
from torch.nn.utils.rnn import pad_sequence
from torch.utils.data import DataLoader
from transformers import get_cosine_schedule_with_warmup, get_linear_schedule_with_warmup

MONTHS = "january february march april may june july august september october november december".split()
CHARS = "\0<>" + " -,0123456789abcdefghijklmnopqrstuvwxyz"
PAD, BOS, EOS = 0, 1, 2


def example(rng):
    y, m, d = rng.randint(1900, 2029), rng.randint(1, 12), rng.randint(1, 28)
    form = rng.choice(["{d} {m} {y}", "{m} {d}, {y}", "{y} {m} {d}"])
    return form.format(d=d, m=MONTHS[m - 1], y=y), f"{y}-{m:02d}-{d:02d}"


def encode(text):
    return torch.tensor([BOS] + [CHARS.index(c) for c in text] + [EOS])


def collate(rows):
    src, tgt = zip(*rows)
    return {"src": pad_sequence([encode(s) for s in src], True, PAD), "tgt": pad_sequence([encode(t) for t in tgt], True, PAD)}


class Seq2Seq(nn.Module):
    def __init__(self, d=64, layers=2, dropout=0.0, std=None):
        super().__init__()
        self.emb = nn.Embedding(len(CHARS), d, padding_idx=PAD)
        self.pos = nn.Embedding(40, d)
        self.core = nn.Transformer(d, 4, layers, layers, 2 * d, dropout, batch_first=True, norm_first=True)
        self.head = nn.Linear(d, len(CHARS))
        if std is not None:
            for p in self.parameters():
                if p.dim() > 1:
                    nn.init.normal_(p, 0.0, std)

    def embed(self, ids):
        return self.emb(ids) + self.pos(torch.arange(ids.shape[1], device=ids.device))

    def forward(self, src, tgt):
        hole, later = src == PAD, torch.ones(tgt.shape[1], tgt.shape[1], dtype=torch.bool, device=tgt.device).triu(1)
        out = self.core(self.embed(src), self.embed(tgt), tgt_mask=later, src_key_padding_mask=hole, tgt_key_padding_mask=tgt == PAD, memory_key_padding_mask=hole)
        return self.head(out)


@torch.no_grad()
def exact_match(model, loader, device):
    model.eval()
    right = n = 0
    for batch in loader:
        src, tgt = batch["src"], batch["tgt"]
        out = torch.full((len(src), 1), BOS, device=device)
        for _ in range(tgt.shape[1] - 1):
            out = torch.cat([out, model(src, out)[:, -1].argmax(-1, keepdim=True)], 1)
        right += (out[:, 1:-1] == tgt[:, 1:-1]).all(1).sum().item()
        n += len(src)
    model.train()
    return right / n


def main():
    ap = argparse.ArgumentParser()
    ap.add_argument("--lr", type=float, default=1.5e-3)
    ap.add_argument("--epochs", type=int, default=4)
    ap.add_argument("--accum", type=int, default=1)
    ap.add_argument("--sched", default="cosine")
    ap.add_argument("--clip", type=float, default=1.0)
    ap.add_argument("--mixed", default="no")
    ap.add_argument("--std", type=float)
    ap.add_argument("--warmup", type=int, default=20)
    ap.add_argument("--sgd", action="store_true")
    ap.add_argument("--forget-step", action="store_true")
    ap.add_argument("--train", type=int, default=1920)
    ap.add_argument("--log", default="mean")
    ap.add_argument("--retain", action="store_true")
    a = ap.parse_args()
    set_seed(5)
    acc = Accelerator(gradient_accumulation_steps=a.accum, mixed_precision=a.mixed, cpu=True)
    rng = random.Random(5)
    train = DataLoader([example(rng) for _ in range(a.train)], batch_size=32, shuffle=True, collate_fn=collate)
    test = DataLoader([example(rng) for _ in range(64)], batch_size=64, collate_fn=collate)
    model = Seq2Seq(std=a.std)
    opt = torch.optim.SGD(model.parameters(), lr=a.lr, momentum=0.9) if a.sgd else torch.optim.AdamW(model.parameters(), lr=a.lr)
    updates = a.epochs * len(train) // a.accum
    if a.sched == "cosine":
        sched = get_cosine_schedule_with_warmup(opt, a.warmup, updates)
    elif a.sched == "linear":
        sched = get_linear_schedule_with_warmup(opt, a.warmup, updates)
    elif a.sched == "epochs":  # meant: epochs
        sched = get_linear_schedule_with_warmup(opt, 0, 12)
    model, opt, train, test, sched = acc.prepare(model, opt, train, test, sched)
    criterion = nn.CrossEntropyLoss(ignore_index=PAD)
    seen, kept = 0, []
    for epoch in range(a.epochs):
        total = 0.0
        for batch in train:
            with acc.accumulate(model):
                logits = model(batch["src"], batch["tgt"][:, :-1])
                loss = criterion(logits.reshape(-1, len(CHARS)), batch["tgt"][:, 1:].reshape(-1))
                if a.retain:
                    acc.backward(loss, retain_graph=True)
                    kept.append(loss)
                else:
                    acc.backward(loss)
                if acc.sync_gradients:
                    acc.clip_grad_norm_(model.parameters(), a.clip)
                opt.step()
                if not a.forget_step:
                    sched.step()
                opt.zero_grad()
            total += loss if a.log == "tensor" else loss.item()
            seen += 1
        acc.print(f"epoch {epoch} loss {float(total) / len(train):.3f} exact {exact_match(model, test, acc.device):.2f} lr {opt.param_groups[0]['lr']:.2e}")


if __name__ == "__main__":
    main()
