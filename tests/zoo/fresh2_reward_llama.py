"""A pairwise reward model from transformers' Llama: chosen and rejected answers in one padded batch, Bradley-Terry loss with margin."""

import os
import random
import sys

os.environ.setdefault("HF_HUB_OFFLINE", "1")
import torch
import torch.nn.functional as F
from torch.utils.data import DataLoader
from transformers import LlamaConfig, LlamaModel, get_cosine_schedule_with_warmup

MODE = sys.argv[1] if len(sys.argv) > 1 else "left"
PAD, VOCAB = 0, 90
random.seed(5)
torch.manual_seed(5)
torch.set_num_threads(1)


def pairs(n):
    """The chosen answer repeats letters of the prompt, the rejected one does not."""
    out = []
    for _ in range(n):
        prompt = [random.randrange(1, VOCAB) for _ in range(random.randint(4, 10))]
        good = [random.choice(prompt) for _ in range(random.randint(3, 9))]
        bad = [random.randrange(1, VOCAB) for _ in range(random.randint(3, 9))]
        out.append(([*prompt, 89, *good], [*prompt, 89, *bad]))
    return out


def collate(rows):
    seqs = [a for a, _ in rows] + [b for _, b in rows]
    width = max(map(len, seqs))
    left = MODE not in ("right", "lastcolumn", "rightnomask")
    ids = [[PAD] * (width - len(s)) + s if left else s + [PAD] * (width - len(s)) for s in seqs]
    ids = torch.tensor(ids)
    return ids, (ids != PAD).long()


class RewardModel(torch.nn.Module):
    def __init__(self):
        super().__init__()
        config = LlamaConfig(
            vocab_size=VOCAB,
            hidden_size=64,
            intermediate_size=128,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=2,
            max_position_embeddings=64,
            pad_token_id=PAD,
            bos_token_id=None,
            eos_token_id=None,
        )
        self.body = LlamaModel(config)
        self.score = torch.nn.Linear(64, 1, bias=False)
        torch.nn.init.normal_(self.score.weight, std=1 / (64 + 1))

    def forward(self, ids, mask):
        if MODE in ("leftnomask", "rightnomask"):
            h = self.body(input_ids=ids).last_hidden_state
        else:
            places = (mask.cumsum(-1) - 1).clamp(min=0)
            h = self.body(input_ids=ids, attention_mask=mask, position_ids=places).last_hidden_state
        if MODE in ("right", "rightnomask"):
            last = mask.sum(1) - 1
            h = h[torch.arange(len(ids)), last]
        else:  # with the padding on the left, and by mistake with it on the right
            h = h[:, -1]
        return self.score(h)


model = RewardModel()
model.train()
loader = DataLoader(pairs(600), batch_size=12, shuffle=True, collate_fn=collate, drop_last=True)
decay = [p for p in model.parameters() if p.ndim >= 2]
rest = [p for p in model.parameters() if p.ndim < 2]
optimizer = torch.optim.AdamW([{"params": decay, "weight_decay": 0.01}, {"params": rest, "weight_decay": 0.0}], lr=5e-4)
if MODE == "newhead":
    model.score = torch.nn.Linear(64, 1)
schedule = get_cosine_schedule_with_warmup(optimizer, 8, len(loader))
for step, (ids, mask) in enumerate(loader):
    rewards = model(ids, mask)
    chosen, rejected = rewards.chunk(2)
    if MODE == "halfdetached":
        rejected = rejected.data
    loss = -F.logsigmoid(chosen - rejected).mean()
    if MODE == "flatgrad":
        loss = loss + 0.01 * (chosen.mean() + rejected.mean()) ** 2
    loss.backward()
    torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    optimizer.step()
    schedule.step()
    optimizer.zero_grad()
    if step % 20 == 0:
        print(
            step,
            f"loss {loss.item():.3f} acc {(chosen > rejected).float().mean().item():.2f} margin {(chosen - rejected).mean().item():.3f}",
        )
