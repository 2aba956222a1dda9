import argparse, os, time
import torch
import torch.nn as nn

parser = argparse.ArgumentParser(description="RNN language model (word_language_model style)")
parser.add_argument("--rnn", default="LSTM"); parser.add_argument("--tied", action="store_true")
parser.add_argument("--lr", type=float, default=5.0); parser.add_argument("--clip", type=float, default=0.25)
parser.add_argument("--mode", default="")
args = parser.parse_args()
torch.manual_seed(1111); torch.set_num_threads(1)
here = os.path.dirname(os.path.abspath(__file__))
words = open(os.path.join(here, "..", "..", "examples", "data", "tinyshakespeare.txt")).read()[:60000].split()
vocab = {w: i for i, w in enumerate(sorted(set(words)))}
ids = torch.tensor([vocab[w] for w in words])
ntok = len(vocab)


def batchify(d, b):
    n = d.size(0) // b
    return d.narrow(0, 0, n * b).view(b, -1).t().contiguous()


train, val = batchify(ids[:9000], 10), batchify(ids[9000:], 5)


class RNNModel(nn.Module):
    def __init__(self, nhid=64):
        super().__init__()
        self.drop = nn.Dropout(0.2)
        self.encoder = nn.Embedding(ntok, nhid)
        self.rnn = getattr(nn, args.rnn)(nhid, nhid, 2, dropout=0.2, bidirectional=args.mode == "bidir")
        self.decoder = nn.Linear(nhid * (2 if args.mode == "bidir" else 1), ntok)
        if args.tied:
            self.decoder.weight = self.encoder.weight
        nn.init.uniform_(self.encoder.weight, -0.1, 0.1)
        nn.init.zeros_(self.decoder.bias)

    def forward(self, x, hidden):
        emb = self.drop(self.encoder(x))
        out, hidden = self.rnn(emb, hidden)
        return nn.functional.log_softmax(self.decoder(self.drop(out)).view(-1, ntok), 1), hidden


def repackage(h):
    return h.detach() if isinstance(h, torch.Tensor) else tuple(repackage(v) for v in h)


def get_batch(src, i):
    n = min(35, len(src) - 1 - i)
    return src[i : i + n], src[i + (0 if args.mode == "copy" else 1) : i + (0 if args.mode == "copy" else 1) + n].reshape(-1)


model = RNNModel()
criterion = nn.NLLLoss()


def evaluate():
    if args.mode != "evaltrain":
        model.eval()
    tot, h = 0.0, None
    with torch.no_grad():
        for i in range(0, val.size(0) - 1, 35):
            x, y = get_batch(val, i)
            o, h = model(x, h)
            h = repackage(h)
            tot += len(x) * criterion(o, y).item()
    return tot / (len(val) - 1)


lr = args.lr
for epoch in range(2):
    model.train()
    h = None
    for b, i in enumerate(range(0, train.size(0) - 1, 35)):
        x, y = get_batch(train, i)
        model.zero_grad()
        if h is not None:
            h = repackage(h)
        out, h = model(x, h)
        loss = criterion(out, y)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), args.clip)
        for p in model.parameters():
            p.data.add_(p.grad, alpha=-lr)
        if b % 10 == 0:
            print(epoch, b, round(loss.item(), 3))
    print("valid", evaluate())
    lr /= 2
