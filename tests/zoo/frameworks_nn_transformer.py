# Translation of number words with torch.nn.Transformer, sequence first, like the tutorial.
import math, random, argparse
import torch, torch.nn as nn
from torch.nn.utils.rnn import pad_sequence

torch.set_num_threads(1)
P = argparse.ArgumentParser()
P.add_argument("--bf", action="store_true")
P.add_argument("--slip", default="")
P.add_argument("--n", type=int, default=40)
A = P.parse_args()
torch.manual_seed(7)
random.seed(7)
PAD_IDX, BOS_IDX, EOS_IDX = 0, 1, 2


class PositionalEncoding(nn.Module):
    def __init__(self, emb_size, dropout, maxlen=64):
        super().__init__()
        den = torch.exp(-torch.arange(0, emb_size, 2) * math.log(10000) / emb_size)
        pos = torch.arange(maxlen).reshape(maxlen, 1)
        t = torch.zeros(maxlen, emb_size)
        t[:, 0::2] = torch.sin(pos * den)
        t[:, 1::2] = torch.cos(pos * den)
        self.dropout = nn.Dropout(dropout)
        self.register_buffer("t", t)

    def forward(self, x):
        add = self.t[: x.size(1)][None] if A.bf else self.t[: x.size(0)][:, None]
        return self.dropout(x + add)


class Seq2SeqTransformer(nn.Module):
    def __init__(self, V=60, E=48):
        super().__init__()
        self.transformer = nn.Transformer(E, 4, 2, 2, 96, 0.1, batch_first=A.bf)
        self.generator = nn.Linear(E, V)
        self.src_tok_emb, self.tgt_tok_emb = nn.Embedding(V, E), nn.Embedding(V, E)
        self.pe, self.E = PositionalEncoding(E, 0.1), E

    def forward(self, src, trg, src_mask, tgt_mask, src_pad, tgt_pad, mem_pad):
        s = self.pe(self.src_tok_emb(src.long()) * math.sqrt(self.E))
        t = self.pe(self.tgt_tok_emb(trg) * math.sqrt(self.E))
        return self.generator(self.transformer(s, t, src_mask, tgt_mask, None, src_pad, tgt_pad, mem_pad))


def batch(n=16):
    src, tgt = [], []
    for _ in range(n):
        w = [random.randrange(3, 60) for _ in range(random.randint(4, 12))]
        src.append(torch.tensor(w))
        tgt.append(torch.tensor([BOS_IDX, *((62 - k) for k in w), EOS_IDX]))
    return pad_sequence(src, padding_value=PAD_IDX, batch_first=A.bf), pad_sequence(tgt, padding_value=PAD_IDX, batch_first=A.bf)


def create_mask(src, tgt):
    S, T = (src.shape[1], tgt.shape[1]) if A.bf else (src.shape[0], tgt.shape[0])
    tgt_mask = torch.triu(torch.ones(T, T, dtype=torch.bool), 1)
    if A.slip == "open":
        tgt_mask[:] = False
    if A.slip == "off1":
        tgt_mask = torch.triu(torch.ones(T, T, dtype=torch.bool), 2)
    if A.slip == "blind":
        tgt_mask = ~torch.eye(T, dtype=torch.bool)
    sp, tp = (src == PAD_IDX), (tgt == PAD_IDX)
    if not A.bf:
        sp, tp = sp.t(), tp.t()
    return torch.zeros(S, S, dtype=torch.bool), tgt_mask, sp, tp


net = Seq2SeqTransformer()
if A.slip != "noxavier":
    for p in net.parameters():
        if p.dim() > 1:
            nn.init.xavier_uniform_(p)
loss_fn = nn.CrossEntropyLoss(ignore_index=-100 if A.slip == "padloss" else PAD_IDX)
optimizer = torch.optim.Adam(net.parameters(), lr=1e-3, betas=(0.9, 0.98), eps=1e-9)
for it in range(A.n):
    net.train()
    src, tgt = batch()
    tin, tout = (tgt[:, :-1], tgt[:, 1:]) if A.bf else (tgt[:-1], tgt[1:])
    if A.slip == "noshift":
        tin, tout = tgt, tgt
    sm, tm, sp, tp = create_mask(src, tin)
    if A.slip == "nosrcpad":
        sp = None
    mp = None if A.slip in ("nomempad", "nosrcpad") else sp
    logits = net(src, tin, sm, tm, sp, tp, mp)
    optimizer.zero_grad()
    loss = loss_fn(logits.reshape(-1, logits.shape[-1]), tout.reshape(-1))
    loss.backward()
    optimizer.step()
    if it % 10 == 9:
        if A.slip != "noeval":
            net.eval()
        with torch.no_grad():
            s, t = batch(8)
            i, o = (t[:, :-1], t[:, 1:]) if A.bf else (t[:-1], t[1:])
            m = create_mask(s, i)
            v = loss_fn(net(s, i, *m, m[2]).reshape(-1, 60), o.reshape(-1))
        print(it, f"{loss.item():.3f} {v.item():.3f}")
