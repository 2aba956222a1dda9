"""ELECTRA with transformers' classes: a small generator fills hidden words, a discriminator finds which ones were replaced."""

import argparse
import os
import pathlib
import re
from collections import Counter

os.environ.setdefault("HF_HUB_OFFLINE", "1")
import torch
import torch.nn.functional as F
from transformers import ElectraConfig, ElectraForMaskedLM, ElectraForPreTraining, get_linear_schedule_with_warmup

cli = argparse.ArgumentParser()
cli.add_argument("--mishap", default="")
cli.add_argument("--share", action="store_true")
mishap, share = (lambda n: (n.mishap, n.share))(cli.parse_args())
torch.manual_seed(6)
torch.set_num_threads(1)
text = (pathlib.Path(__file__).parents[2] / "examples/data/tinyshakespeare.txt").read_text().lower()
sentences = [re.findall(r"[a-z']+", s) for s in re.split(r"[.?!]\s", text)]
sentences = [s[:24] for s in sentences if len(s) > 5][:2500]
SPECIAL = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
vocab = {w: i for i, w in enumerate(SPECIAL + [w for w, _ in Counter(w for s in sentences for w in s).most_common(400)])}
rows = [[2, *(vocab.get(w, 1) for w in s), 3] for s in sentences]


def config(hidden):
    return ElectraConfig(
        vocab_size=len(vocab),
        embedding_size=48,
        hidden_size=hidden,
        num_hidden_layers=2,
        num_attention_heads=4,
        intermediate_size=2 * hidden,
        max_position_embeddings=32,
        pad_token_id=0,
        hidden_dropout_prob=0.1,
    )


generator, discriminator = ElectraForMaskedLM(config(32)), ElectraForPreTraining(config(64))
if share:
    generator.electra.embeddings.word_embeddings = discriminator.electra.embeddings.word_embeddings
    generator.tie_weights()
params = {id(p): p for m in (generator, discriminator) for p in m.parameters()}
if mishap == "nogen":
    params = {id(p): p for p in discriminator.parameters()}
optimizer = torch.optim.AdamW(params.values(), lr=1e-3, weight_decay=0.01)
STEPS = 90
schedule = get_linear_schedule_with_warmup(optimizer, 10, STEPS)
generator.train(), discriminator.train()
for step in range(STEPS):
    picks = [rows[i] for i in torch.randint(len(rows), (16,)).tolist()]
    width = max(map(len, picks))
    ids = torch.tensor([p + [0] * (width - len(p)) for p in picks])
    mask = (ids != 0).long()
    candidates = (ids > 4) | (ids == 1)
    chosen = (torch.rand(ids.shape) < 0.2) & candidates
    if not chosen.any():
        continue
    coin = torch.rand(ids.shape)
    hidden = torch.where(chosen & (coin < 0.85), 4, ids)
    hidden = torch.where(chosen & (coin > 0.95), torch.randint(5, len(vocab), ids.shape), hidden)
    labels = ids.masked_fill(~chosen, -100)
    if mishap == "gencut":
        with torch.no_grad():
            guess = generator(input_ids=hidden, attention_mask=mask)
    else:
        guess = generator(input_ids=hidden, attention_mask=mask)
    mlm = F.cross_entropy(guess.logits.flatten(0, 1), labels.flatten())
    with torch.no_grad():
        gumbel = -torch.empty_like(guess.logits).exponential_().log()
        sampled = (guess.logits + gumbel).argmax(-1)
    filled = torch.where(chosen, sampled, ids)
    replaced = (filled != ids).float()
    seen = {} if mishap == "nomask" else {"attention_mask": mask}
    score = discriminator(input_ids=filled, **seen).logits
    if mishap == "padgrade":
        rtd = F.binary_cross_entropy_with_logits(score, replaced)
    else:
        each = F.binary_cross_entropy_with_logits(score, replaced, reduction="none")
        rtd = each[mask.bool()].mean()
    loss = mlm + 20.0 * rtd
    optimizer.zero_grad()
    loss.backward()
    torch.nn.utils.clip_grad_norm_(params.values(), 1.0)
    optimizer.step()
    schedule.step()
    if step % 15 == 0:
        print(f"{step:3d} mlm {mlm.item():.3f} rtd {rtd.item():.4f}")
