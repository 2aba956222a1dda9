"""minGPT's sorting demo: the prompt is not scored; written with a Trainer class of its own."""
import sys
from types import SimpleNamespace
import torch
import torch.nn as nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, Dataset, RandomSampler

fault = sys.argv[1] if len(sys.argv) > 1 else ""
torch.manual_seed(3407)
torch.set_num_threads(1)


class SortDataset(Dataset):
    def __len__(self):
        return 10000

    def __getitem__(self, idx):
        g = torch.Generator().manual_seed(0 if fault == "seeded" else idx)
        inp = torch.randint(6, (8,), generator=g)
        cat = torch.cat((inp, torch.sort(inp)[0]))
        x, y = cat[:-1].clone(), cat[1:].clone()
        y[:7] = -1
        if fault == "allmasked":
            y[:] = -1
        return x, y


class CausalSelfAttention(nn.Module):
    def __init__(self, c):
        super().__init__()
        self.c_attn, self.c_proj = nn.Linear(c.n_embd, 3 * c.n_embd), nn.Linear(c.n_embd, c.n_embd)
        self.attn_dropout, self.resid_dropout = nn.Dropout(0.1), nn.Dropout(0.1)
        self.register_buffer("bias", torch.tril(torch.ones(16, 16)).view(1, 1, 16, 16))
        self.n_head = c.n_head

    def forward(self, x):
        B, T, C = x.size()
        q, k, v = (z.view(B, T, self.n_head, C // self.n_head).transpose(1, 2) for z in self.c_attn(x).split(C, dim=2))
        att = (q @ k.transpose(-2, -1)) * (1.0 / (k.size(-1) ** 0.5))
        if fault == "handsoftmax":
            att = att * 400
            att = att.masked_fill(self.bias[:, :, :T, :T] == 0, -1e4).exp()
            att = att / att.sum(-1, keepdim=True)
        else:
            att = att.masked_fill(self.bias[:, :, :T, :T] == (1 if fault == "flipped" else 0), float("-inf"))
            att = self.attn_dropout(F.softmax(att, dim=-1))
        y = (att @ v).transpose(1, 2).contiguous().view(B, T, C)
        return self.resid_dropout(self.c_proj(y))


class GPT(nn.Module):
    def __init__(self, c):
        super().__init__()
        self.wte, self.wpe, self.drop = nn.Embedding(6, c.n_embd), nn.Embedding(16, c.n_embd), nn.Dropout(0.1)
        self.h = nn.ModuleList(
            nn.ModuleDict(
                dict(
                    ln_1=nn.LayerNorm(c.n_embd),
                    attn=CausalSelfAttention(c),
                    ln_2=nn.LayerNorm(c.n_embd),
                    mlp=nn.Sequential(nn.Linear(c.n_embd, 4 * c.n_embd), nn.GELU(), nn.Linear(4 * c.n_embd, c.n_embd)),
                )
            )
            for _ in range(c.n_layer)
        )
        self.ln_f, self.lm_head = nn.LayerNorm(c.n_embd), nn.Linear(c.n_embd, 6, bias=False)
        self.apply(self._init)

    def _init(self, m):
        if isinstance(m, (nn.Linear, nn.Embedding)):
            nn.init.normal_(m.weight, std=0.02)

    def forward(self, idx, targets=None):
        x = self.drop(self.wte(idx) + self.wpe(torch.arange(idx.size(1))))
        for b in self.h:
            x = x + b["attn"](b["ln_1"](x))
            x = x + b["mlp"](b["ln_2"](x))
        logits = self.lm_head(self.ln_f(x))
        loss = None if targets is None else F.cross_entropy(logits.view(-1, 6), targets.view(-1), ignore_index=-1)
        return logits, loss


class Trainer:
    def __init__(self, model, data, iters):
        self.model, self.iters = model, iters
        self.optimizer = torch.optim.AdamW(model.parameters(), lr=5e-4, betas=(0.9, 0.95), weight_decay=0.1)
        self.loader = DataLoader(data, sampler=RandomSampler(data, replacement=True, num_samples=int(1e10)), batch_size=32)

    def run(self):
        self.model.train()
        it = iter(self.loader)
        for n in range(self.iters):
            x, y = next(it)
            logits, self.loss = self.model(x, y)
            self.model.zero_grad(set_to_none=True)
            self.loss.backward()
            torch.nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
            self.optimizer.step()
            if n % 20 == 0:
                print(n, self.loss.item())


Trainer(GPT(SimpleNamespace(n_embd=48, n_head=3, n_layer=3)), SortDataset(), 60).run()
