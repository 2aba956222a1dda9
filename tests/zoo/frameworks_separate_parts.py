"""Encoder from transformers, head of our own, never joined in one module; features of the pooler are not needed here."""

import itertools, sys
import torch
import torch.nn.functional as F
from transformers import BertConfig, BertModel

torch.set_num_threads(1)
torch.manual_seed(0)
how = sys.argv[1] if len(sys.argv) > 1 else "fine"
encoder = BertModel(BertConfig(vocab_size=50, hidden_size=32, num_hidden_layers=2, num_attention_heads=2, intermediate_size=64))
classifier = torch.nn.Sequential(torch.nn.Dropout(0.1), torch.nn.Linear(32, 4))
weight = torch.nn.Parameter(torch.randn(32, 4) * 0.1)
params = itertools.chain(encoder.parameters(), [weight] if how == "rawhead" else classifier.parameters())
if how == "features":  # the encoder is used as it is
    params = classifier.parameters()
if how == "forgotten":
    params = classifier.parameters()
opt = torch.optim.Adam(params, 1e-3)
crit = torch.nn.CrossEntropyLoss()
for step in range(40):
    y = torch.randint(0, 4, (16,))
    x = torch.randint(2, 50, (16, 12))
    x[:, 3] = 2 + y
    n = torch.randint(6, 13, (16,))
    keep = torch.arange(12)[None] < n[:, None]
    x = x * keep
    with torch.set_grad_enabled(how != "features"):
        enc = encoder(input_ids=x, attention_mask=keep.long())
    first = enc.last_hidden_state[:, 0] if how != "hardfeatures" else torch.tensor(enc.last_hidden_state[:, 0].tolist())
    logits = first @ weight if how == "rawhead" else classifier(first)
    loss = crit(F.softmax(logits, -1).log() if how == "logsoftmax" else logits, y)
    opt.zero_grad()
    loss.backward()
    opt.step()
    if step % 10 == 0:
        print(f"{step:3d} {loss.item():.4f}")
encoder.eval(), classifier.eval()
with torch.inference_mode():
    print("done", crit(classifier(encoder(x)[0][:, 0]), y).item())
