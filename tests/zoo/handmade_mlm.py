#!/usr/bin/env python
"""BERT-style masked language modelling on synthetic sentences with padding."""
import sys
import torch
from torch import nn
import torch.nn.functional as F
from torch.utils.data import DataLoader, Dataset

PAD, MASK, V = 0, 1, 80
flag = sys.argv[1] if len(sys.argv) > 1 else "fine"
torch.manual_seed(100)
torch.set_num_threads(1)


class Sentences(Dataset):
    def __init__(self, n):
        g = torch.Generator().manual_seed(n)
        self.rows = []
        for _ in range(n):
            L = int(torch.randint(6, 24, (1,), generator=g))
            a, b = torch.randint(2, V, (2,), generator=g).tolist()
            self.rows.append(torch.tensor([(a + b * i) % (V - 2) + 2 for i in range(L)]))

    def __len__(self):
        return len(self.rows)

    def __getitem__(self, i):
        return self.rows[i]


def collate(rows):
    x = nn.utils.rnn.pad_sequence(rows, batch_first=True, padding_value=PAD)
    chosen = (torch.rand(x.shape) < 0.2) & (x != PAD)
    chosen[:, 1] = True
    y = x.clone()
    if flag == "padloss":
        y[~chosen & (x != PAD)] = -100
    elif flag == "nolabels":
        y[:] = -100
    else:
        y[~chosen] = -100
    inp = x.clone()
    inp[chosen] = MASK
    return {"ids": inp, "labels": y, "attention_mask": (x != PAD).long()}


class Encoder(nn.Module):
    def __init__(self, d=48):
        super().__init__()
        self.word, self.place = nn.Embedding(V, d, padding_idx=PAD), nn.Embedding(32, d)
        layer = nn.TransformerEncoderLayer(d, 4, 96, 0.1, activation="gelu", batch_first=True)
        self.stack = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)
        self.norm = nn.LayerNorm(d)
        self.cls = nn.Linear(d, V)

    def forward(self, ids, attention_mask):
        h = self.word(ids) + self.place(torch.arange(ids.size(1)))
        keep = None if flag == "attendpad" else attention_mask == 0
        return self.cls(self.norm(self.stack(h, src_key_padding_mask=keep)))


net = Encoder()
loader = DataLoader(Sentences(400), 16, shuffle=True, collate_fn=collate)
heldout = DataLoader(Sentences(64), 16, collate_fn=collate)
opt = torch.optim.AdamW(net.parameters(), lr=1e-3)
for epoch in range(2):
    net.train(flag != "evalmode")
    for b in loader:
        out = net(b["ids"], b["attention_mask"])
        loss = F.cross_entropy(out.view(-1, V), b["labels"].view(-1), ignore_index=-100)
        opt.zero_grad()
        loss.backward()
        opt.step()
    net.eval()
    with torch.no_grad():
        ev = sum(F.cross_entropy(net(b["ids"], b["attention_mask"]).flatten(0, 1), b["labels"].flatten()).item() for b in heldout)
    print(epoch, loss.item(), ev / len(heldout))
