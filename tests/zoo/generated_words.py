"""A word-level GRU that speaks one word at a time with its hidden state. `--copy`: a seq2seq copier, greedy."""

import random
import sys

import torch
from torch import nn

torch.manual_seed(1)
random.seed(2)
FLAGS = set(sys.argv[1:])
NOUNS, VERBS = "dog cat hen fox owl pig cow bee ant elk".split(), "sees hears follows fears knows meets".split()
ENDS = "today now again here there .".split()


class Speaker(nn.Module):
    def __init__(self, words, width=48):
        super().__init__()
        self.emb, self.cell = nn.Embedding(words, width), nn.GRU(width, width, batch_first=True)
        self.out = nn.Linear(width, words)

    def forward(self, tokens, hidden=None):
        states, hidden = self.cell(self.emb(tokens), hidden)
        return self.out(states), hidden


class Copier(nn.Module):
    """Attends over the source; the target is the source again."""

    def __init__(self, words, width=32):
        super().__init__()
        self.src, self.tgt, self.where = nn.Embedding(words, width), nn.Embedding(words, width), nn.Embedding(64, width)
        self.body = nn.Transformer(width, 4, 1, 1, 64, dropout=0.0, batch_first=True)
        self.out = nn.Linear(width, words)

    def forward(self, src, tgt):
        s = self.src(src) + self.where(torch.arange(src.shape[1]))
        t = self.tgt(tgt) + self.where(torch.arange(tgt.shape[1]))
        mask = nn.Transformer.generate_square_subsequent_mask(tgt.shape[1])
        return self.out(self.body(s, t, tgt_mask=mask))


def speak():
    story = [w for _ in range(900) for w in (random.choice(NOUNS), random.choice(VERBS), random.choice(NOUNS), random.choice(ENDS))]
    words = sorted(set(story))
    data = torch.tensor([words.index(w) for w in story])
    net = Speaker(len(words))
    opt = torch.optim.Adam(net.parameters(), 4e-3)
    for step in range(160):
        at = torch.randint(len(data) - 25, (16,)).tolist()
        rows = torch.stack([data[i : i + 25] for i in at])
        scores, _ = net(rows[:, :-1])
        loss = nn.functional.cross_entropy(scores.transpose(1, 2), rows[:, 1:])
        opt.zero_grad()
        loss.backward()
        opt.step()
        if step % 40 == 0:
            print(step, loss.item())
    net.eval()
    token, hidden, said = data[:1][None], None, []
    for _ in range(70):
        with torch.inference_mode():
            scores, hidden = net(token, None if "--drop-state" in FLAGS else hidden)
        last = scores[:, -1]
        if "--greedy" in FLAGS:
            token = last.argmax(-1, keepdim=True)
        else:
            token = torch.distributions.Categorical(logits=last / (5.0 if "--hot" in FLAGS else 0.9)).sample()[:, None]
        said.append(words[token.item()])
    print(" ".join(said))


def copy():
    net = Copier(24)
    opt = torch.optim.Adam(net.parameters(), 2e-3)
    for step in range(150):
        src = torch.randint(3, 24, (32, 30))
        src[:, 10:] = src[:, :10].repeat(1, 2)
        tgt = torch.cat([torch.ones(32, 1, dtype=torch.long), src], 1)
        scores = net(src, tgt[:, :-1])
        loss = nn.functional.cross_entropy(scores.flatten(0, 1), tgt[:, 1:].flatten())
        opt.zero_grad()
        loss.backward()
        opt.step()
    print(loss.item())
    net.eval()
    with torch.no_grad():
        src = torch.randint(3, 24, (3, 30))
        src[:, 10:] = src[:, :10].repeat(1, 2)
        made = torch.ones(3, 1, dtype=torch.long)
        for _ in range(30):
            made = torch.cat([made, net(src, made)[:, -1].argmax(-1, keepdim=True)], 1)
    print((made[:, 1:] == src).float().mean().item())


copy() if "--copy" in FLAGS else speak()
