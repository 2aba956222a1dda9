"""A small bidirectional encoder learns to fill in masked characters of Shakespeare.

python examples/encoder.py
"""

import itertools

import torch
from torch.nn import functional as F

from sickbay.reference.case import shipped_corpus
from sickbay.reference.data import random_batches
from sickbay.reference.data.objectives import MaskedToken
from sickbay.reference.models.config import Config
from sickbay.reference.models.encoder import Encoder

STEPS, BATCH, CONTEXT, CHARACTERS = 200, 16, 48, 65

objective = MaskedToken(CHARACTERS)
torch.manual_seed(0)
model = Encoder(Config(dim=64, num_layers=2, num_heads=4, context=CONTEXT, vocab_size=CHARACTERS + objective.extra_ids))
optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)

batches = random_batches(shipped_corpus().numpy(), CONTEXT, BATCH, seed=0)
for step, (rows, _) in enumerate(itertools.islice(batches, STEPS)):
    inputs, targets = objective(rows, step)
    loss = F.cross_entropy(model(*inputs).flatten(0, 1), targets.flatten())
    loss.backward()
    torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    optimizer.step()
    optimizer.zero_grad()
    if step % 50 == 49:
        print(f"step {step + 1}: loss {loss.item():.3f}")
