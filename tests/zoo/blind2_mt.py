"""Number words to digits with nn.Transformer, in the manner of the translation tutorial: padded batches, shifted targets."""

import argparse
import math
import random

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence
from torch.utils.data import DataLoader

parser = argparse.ArgumentParser()
parser.add_argument("--bug", default="none")
args = parser.parse_args()
random.seed(3)
torch.manual_seed(3)
torch.set_num_threads(1)

UNK_IDX, PAD_IDX, BOS_IDX, EOS_IDX = 0, 1, 2, 3
WORDS = ["zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine"]
SRC = {w: i + 4 for i, w in enumerate(WORDS)}
TGT = {str(d): d + 4 for d in range(10)}


def make_pair():
    digits = [random.randrange(10) for _ in range(random.randint(3, 9))]
    return [SRC[WORDS[d]] for d in digits], [TGT[str(d)] for d in reversed(digits)]


pairs = [make_pair() for _ in range(900)]


def tensor_transform(token_ids):
    return torch.cat((torch.tensor([BOS_IDX]), torch.tensor(token_ids), torch.tensor([EOS_IDX])))


def collate_fn(batch):
    src = pad_sequence([tensor_transform(s) for s, _ in batch], padding_value=PAD_IDX)
    tgt = pad_sequence([tensor_transform(t) for _, t in batch], padding_value=PAD_IDX)
    return src, tgt


class PositionalEncoding(nn.Module):
    def __init__(self, emb_size: int, dropout: float, maxlen: int = 60):
        super().__init__()
        den = torch.exp(-torch.arange(0, emb_size, 2) * math.log(10000) / emb_size)
        pos = torch.arange(0, maxlen).reshape(maxlen, 1)
        table = torch.zeros((maxlen, emb_size))
        table[:, 0::2] = torch.sin(pos * den)
        table[:, 1::2] = torch.cos(pos * den)
        self.dropout = nn.Dropout(dropout)
        self.register_buffer("table", table.unsqueeze(-2))

    def forward(self, x: Tensor):
        return self.dropout(x + self.table[: x.size(0), :])


class Seq2SeqTransformer(nn.Module):
    def __init__(self, emb=48, heads=4, layers=2, ffn=96, dropout=0.1):
        super().__init__()
        self.transformer = nn.Transformer(emb, heads, layers, layers, ffn, dropout)
        self.generator = nn.Linear(emb, 14)
        self.src_tok_emb, self.tgt_tok_emb = nn.Embedding(14, emb), nn.Embedding(14, emb)
        self.positional_encoding = PositionalEncoding(emb, dropout)
        self.scale = math.sqrt(emb)

    def forward(self, src, trg, src_mask, tgt_mask, src_padding_mask, tgt_padding_mask, memory_key_padding_mask):
        src_emb = self.positional_encoding(self.src_tok_emb(src.long()) * self.scale)
        tgt_emb = self.positional_encoding(self.tgt_tok_emb(trg.long()) * self.scale)
        outs = self.transformer(src_emb, tgt_emb, src_mask, tgt_mask, None, src_padding_mask, tgt_padding_mask, memory_key_padding_mask)
        return self.generator(outs)


def create_mask(src, tgt):
    n, m = src.shape[0], tgt.shape[0]
    tgt_mask = torch.triu(torch.ones(n * 0 + m, m, dtype=torch.bool), diagonal=1)
    if args.bug == "leak":
        tgt_mask = torch.zeros(m, m, dtype=torch.bool)
    if args.bug == "inverted":
        tgt_mask = torch.tril(torch.ones(m, m, dtype=torch.bool), diagonal=-1)
    src_mask = torch.zeros((n, n), dtype=torch.bool)
    if args.bug == "pads":
        return src_mask, tgt_mask, None, None
    return src_mask, tgt_mask, (src == PAD_IDX).transpose(0, 1), (tgt == PAD_IDX).transpose(0, 1)


transformer = Seq2SeqTransformer()
for p in transformer.parameters():
    if p.dim() > 1:
        nn.init.xavier_uniform_(p)
loss_fn = nn.CrossEntropyLoss() if args.bug == "padloss" else nn.CrossEntropyLoss(ignore_index=PAD_IDX)
optimizer = torch.optim.Adam(transformer.parameters(), lr=1e-3, betas=(0.9, 0.98), eps=1e-9)


def train_epoch(part):
    transformer.train()
    losses = 0.0
    loader = DataLoader(part, batch_size=32, shuffle=True, collate_fn=collate_fn)
    for src, tgt in loader:
        tgt_input = tgt[:-1, :]
        sm, tm, sp, tp = create_mask(src, tgt_input)
        logits = transformer(src, tgt_input, sm, tm, sp, tp, sp)
        optimizer.zero_grad()
        tgt_out = tgt[:-1, :] if args.bug == "unshifted" else tgt[1:, :]
        loss = loss_fn(logits.reshape(-1, logits.shape[-1]), tgt_out.reshape(-1))
        loss.backward()
        optimizer.step()
        losses += loss.item()
    return losses / len(loader)


@torch.no_grad()
def evaluate(part):
    transformer.eval()
    losses = 0.0
    loader = DataLoader(part, batch_size=32, collate_fn=collate_fn)
    for src, tgt in loader:
        tgt_input = tgt[:-1, :]
        logits = transformer(src, tgt_input, *create_mask(src, tgt_input), create_mask(src, tgt_input)[2])
        losses += loss_fn(logits.reshape(-1, logits.shape[-1]), tgt[1:, :].reshape(-1)).item()
    return losses / len(loader)


for epoch in range(1, 5):
    print(f"Epoch: {epoch}, Train loss: {train_epoch(pairs[:800]):.3f}, Val loss: {evaluate(pairs[800:]):.3f}")
