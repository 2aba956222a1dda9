"""minGPT-like: a Trainer class with callbacks, learns to sort digits."""
import sys
import time
from collections import defaultdict

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch.utils.data import DataLoader, Dataset


class CfgNode:
    def __init__(self, **kw):
        self.__dict__.update(kw)

    def merge_from_args(self, args):
        for arg in args:
            k, v = arg.lstrip("-").split("=")
            assert hasattr(self, k), k
            setattr(self, k, type(getattr(self, k))(v))


C = CfgNode(lr=3e-3, steps=200, std=0.02, opt="adamw", n=3000, wd=0.1, clip=1.0, ones="", gain=1.0)
C.merge_from_args(sys.argv[1:])
torch.manual_seed(3407)


class SortDataset(Dataset):
    def __init__(self, length=6, digits=5):
        self.length, self.digits = length, digits

    def __len__(self):
        return C.n

    def __getitem__(self, i):
        g = torch.Generator().manual_seed(i)
        inp = torch.randint(self.digits, (self.length,), generator=g)
        cat = torch.cat((inp, inp.sort()[0]))
        x, y = cat[:-1].clone(), cat[1:].clone()
        y[: self.length - 1] = -1
        return x, y


class Attn(nn.Module):
    def __init__(self, d, h):
        super().__init__()
        self.h = h
        self.qkv, self.proj = nn.Linear(d, 3 * d), nn.Linear(d, d)

    def forward(self, x):
        b, t, d = x.shape
        q, k, v = self.qkv(x).view(b, t, 3, self.h, d // self.h).permute(2, 0, 3, 1, 4)
        return self.proj(F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2).reshape(b, t, d))


class Block(nn.Module):
    def __init__(self, d, h):
        super().__init__()
        self.l1, self.a, self.l2 = nn.LayerNorm(d), Attn(d, h), nn.LayerNorm(d)
        self.m = nn.ModuleDict(dict(fc=nn.Linear(d, 4 * d), act=nn.GELU(), out=nn.Linear(4 * d, d)))

    def forward(self, x):
        x = x + self.a(self.l1(x))
        return x + self.m.out(self.m.act(self.m.fc(self.l2(x))))


class GPT(nn.Module):
    def __init__(self, vocab, block, d=48, h=4, layers=3):
        super().__init__()
        self.tok, self.pos = nn.Embedding(vocab, d), nn.Embedding(block, d)
        self.blocks = nn.Sequential(*[Block(d, h) for _ in range(layers)])
        self.ln, self.head = nn.LayerNorm(d), nn.Linear(d, vocab, bias=False)
        self.apply(self._init_weights)

    def _init_weights(self, m):
        if isinstance(m, (nn.Linear, nn.Embedding)):
            nn.init.normal_(m.weight, std=C.std)
            if getattr(m, "bias", None) is not None:
                nn.init.zeros_(m.bias)
        if C.ones and isinstance(m, nn.Linear):
            nn.init.constant_(m.weight, float(C.ones))

    def forward(self, x, y=None):
        z = self.tok(x) + self.pos(torch.arange(x.shape[1], device=x.device))
        logits = self.head(self.ln(self.blocks(z)))
        return logits, None if y is None else F.cross_entropy(logits.view(-1, logits.size(-1)), y.view(-1), ignore_index=-1)


class Trainer:
    def __init__(self, model, data):
        self.model, self.data, self.callbacks = model, data, defaultdict(list)
        mk = {"adamw": lambda p: torch.optim.AdamW(p, lr=C.lr, betas=(0.9, 0.95), weight_decay=C.wd),
              "sgd": lambda p: torch.optim.SGD(p, lr=C.lr, momentum=0.9),
              "sgdplain": lambda p: torch.optim.SGD(p, lr=C.lr)}[C.opt]
        self.optimizer = mk(model.parameters())
        self.iter_num = 0

    def run(self):
        loader = DataLoader(self.data, sampler=torch.utils.data.RandomSampler(self.data, replacement=True, num_samples=10**8), batch_size=32)
        self.model.train()
        it, self.t = iter(loader), time.time()
        while self.iter_num < C.steps:
            x, y = next(it)
            _, self.loss = self.model(x, y)
            self.model.zero_grad(set_to_none=True)
            self.loss.backward()
            if C.clip:
                torch.nn.utils.clip_grad_norm_(self.model.parameters(), C.clip)
            self.optimizer.step()
            for cb in self.callbacks["on_batch_end"]:
                cb(self)
            self.iter_num += 1


data = SortDataset()
trainer = Trainer(GPT(data.digits, data.length * 2 - 1), data)
trainer.callbacks["on_batch_end"].append(lambda t: t.iter_num % 20 == 0 and print(f"iter {t.iter_num}: {t.loss.item():.4f}"))
trainer.run()
trainer.model.eval()
with torch.no_grad():
    ok = 0
    for i in range(40):
        x, _ = data[10**6 + i]
        inp = x[: data.length]
        seq = inp[None]
        for _ in range(data.length):
            seq = torch.cat((seq, trainer.model(seq)[0][:, -1].argmax(-1, keepdim=True)), 1)
        ok += int((seq[0, data.length :] == inp.sort()[0]).all())
print("sorted", ok, "/ 40; loss", trainer.loss.item())
