"""Parameter-efficient tuning of a GPT-2 trained here: soft prompt, adapters or biases; with or without recomputing."""

import os
import pathlib
import sys
import tempfile

os.environ.setdefault("HF_HUB_OFFLINE", "1")
import torch
from torch import nn
from transformers import GPT2Config, GPT2LMHeadModel

METHOD = sys.argv[1] if len(sys.argv) > 1 else "prompt"
FLAGS = set(sys.argv[2:])
torch.manual_seed(10)
torch.set_num_threads(1)
text = (pathlib.Path(__file__).parents[2] / "examples/data/tinyshakespeare.txt").read_text()
table = {c: i for i, c in enumerate(sorted(set(text)))}
first = torch.tensor([table[c] for c in text[:60_000]])
loud = torch.tensor([table[c.upper()] for c in text[100_000:160_000]])
T = 40


def draw(source, n):
    at = torch.randint(0, len(source) - T, (n,))
    return torch.stack([source[i : i + T] for i in at])


base = GPT2LMHeadModel(GPT2Config(vocab_size=len(table), n_positions=64, n_embd=64, n_layer=2, n_head=4, bos_token_id=0, eos_token_id=0))
opt = torch.optim.AdamW(base.parameters(), lr=3e-3)
for _ in range(60):
    ids = draw(first, 12)
    base(input_ids=ids, labels=ids).loss.backward()
    opt.step()
    opt.zero_grad()
folder = tempfile.mkdtemp()
base.save_pretrained(folder)
del base, opt

model = GPT2LMHeadModel.from_pretrained(folder)
for p in model.parameters():
    p.requires_grad = False


class Prompted(nn.Module):
    """`n` learned vectors stand before the text; they are given no labels."""

    def __init__(self, inner, n=6):
        super().__init__()
        self.inner = inner
        self.prompt = nn.Parameter(inner.transformer.wte.weight[torch.randint(len(table), (n,))].clone())

    def forward(self, ids):
        e = self.inner.transformer.wte(ids)
        prompt = self.prompt.detach() if "cut" in FLAGS else self.prompt
        e = torch.cat([prompt.expand(len(ids), -1, -1), e], 1)
        blank = torch.full((len(ids), len(self.prompt)), -100)
        if "shiftlabels" in FLAGS:
            labels = torch.cat([blank, ids[:, 1:], blank[:, :1]], 1)
        else:
            labels = torch.cat([blank, ids], 1)
        return self.inner(inputs_embeds=e, labels=labels).loss


class Adapter(nn.Module):
    def __init__(self, inner, d=64, r=8):
        super().__init__()
        self.inner, self.down, self.up = inner, nn.Linear(d, r), nn.Linear(r, d)
        nn.init.zeros_(self.up.weight)
        nn.init.zeros_(self.up.bias)
        if "allzero" in FLAGS:
            nn.init.zeros_(self.down.weight)
            nn.init.zeros_(self.down.bias)

    def forward(self, x):
        y = self.inner(x)
        return y + self.up(torch.relu(self.down(y)))


class Plain(nn.Module):
    def __init__(self, inner):
        super().__init__()
        self.inner = inner

    def forward(self, ids):
        return self.inner(input_ids=ids, labels=ids).loss


if METHOD == "prompt":
    tuned = Prompted(model)
elif METHOD == "adapter":
    optimizer_early = torch.optim.AdamW(list(model.parameters()), lr=3e-3) if "early" in FLAGS else None
    for block in model.transformer.h:
        block.mlp = Adapter(block.mlp)
    tuned = Plain(model)
else:
    for name, p in model.named_parameters():
        p.requires_grad = name.endswith("bias") or ".ln_" in name
    tuned = Plain(model)
if "recompute" in FLAGS:
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": "reentrant" in FLAGS})
    if "reentrant" in FLAGS and "inputs" in FLAGS:
        model.enable_input_require_grads()
tuned.train()
trainable = [p for p in tuned.parameters() if p.requires_grad]
optimizer = (
    optimizer_early
    if METHOD == "adapter" and optimizer_early is not None
    else torch.optim.AdamW(trainable, lr=1e-2 if METHOD == "prompt" else 3e-3)
)
print(METHOD, sum(p.numel() for p in trainable), "of", sum(p.numel() for p in tuned.parameters()))
for step in range(60):
    loss = tuned(draw(loud, 12))
    loss.backward()
    optimizer.step()
    optimizer.zero_grad()
    if step % 15 == 0:
        print(step, round(loss.item(), 3))
