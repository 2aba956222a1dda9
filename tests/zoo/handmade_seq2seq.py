import torch
import torch.nn as nn
import argparse

P = argparse.ArgumentParser()
P.add_argument("--oops", default="")
o = P.parse_args()
torch.manual_seed(8)
torch.set_num_threads(1)
BOS, EOS, PAD, V = 1, 2, 0, 30


class Translator(nn.Module):
    def __init__(self, d=32):
        super().__init__()
        self.src, self.tgt = nn.Embedding(V, d), nn.Embedding(V, d)
        self.pos = nn.Embedding(64, d)
        self.core = nn.Transformer(d, 4, 2, 2, 64, dropout=0.0, batch_first=o.oops != "seqfirst")
        self.gen = nn.Linear(d, V)

    def forward(self, s, t):
        pm, tm = s == PAD, t == PAD
        a = self.src(s) + self.pos(torch.arange(s.shape[1]))
        b = self.tgt(t) + self.pos(torch.arange(t.shape[1]))
        c = None if o.oops == "nocausal" else torch.triu(torch.ones(t.shape[1], t.shape[1], dtype=torch.bool), 1)
        if o.oops == "nosrcpad":
            pm = None
        h = self.core(a, b, tgt_mask=c, src_key_padding_mask=pm, tgt_key_padding_mask=tm, memory_key_padding_mask=pm)
        return self.gen(h)


def make(n):
    S, T = [], []
    for _ in range(n):
        L = int(torch.randint(4, 10, (1,)))
        w = torch.randint(3, V, (L,))
        S.append(w)
        T.append(torch.cat([torch.tensor([BOS]), w.flip(0), torch.tensor([EOS])]))
    pad = lambda x: nn.utils.rnn.pad_sequence(x, batch_first=True, padding_value=PAD)
    return pad(S), pad(T)


m = Translator()
for p in m.parameters():
    if p.dim() > 1:
        nn.init.xavier_uniform_(p)
ce = nn.CrossEntropyLoss(ignore_index=-100 if o.oops == "countpad" else PAD, label_smoothing=0.1)
opt = torch.optim.Adam(m.parameters(), lr=1.0, betas=(0.9, 0.98), eps=1e-9)
noam = torch.optim.lr_scheduler.LambdaLR(opt, lambda s: 32**-0.5 * min((s + 1) ** -0.5, (s + 1) * 40**-1.5))
for it in range(50):
    s, t = make(24)
    inp, gold = (t, t) if o.oops == "noshift" else (t[:, :-1], t[:, 1:])
    y = m(s, inp)
    loss = ce(y.reshape(-1, V), gold.reshape(-1))
    opt.zero_grad()
    loss.backward()
    opt.step()
    noam.step()
    if it % 10 == 0:
        print(it, loss.item())
