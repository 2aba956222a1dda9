"""Instruction tuning: prompt masked, left or right padding, pad token borrowed from the end token."""

import argparse, random
import torch
from transformers import LlamaConfig, LlamaForCausalLM, DataCollatorForSeq2Seq

torch.set_num_threads(1)
q = argparse.ArgumentParser()
q.add_argument("--side", default="right")
q.add_argument("--pad", choices=["own", "eos"], default="own")
q.add_argument("--labels", choices=["answer", "all", "notpad", "pads", "none"], default="answer")
q.add_argument("--attention", choices=["yes", "no"], default="yes")
q.add_argument("--positions", choices=["auto", "explicit"], default="auto")
q = q.parse_args()
random.seed(0)
torch.manual_seed(0)
BOS, EOS, SEP = 1, 2, 3
PAD = EOS if q.pad == "eos" else 0
cfg = LlamaConfig(
    vocab_size=48,
    hidden_size=48,
    intermediate_size=96,
    num_hidden_layers=2,
    num_attention_heads=4,
    pad_token_id=PAD,
    bos_token_id=BOS,
    eos_token_id=EOS,
)
net = LlamaForCausalLM(cfg)
opt = torch.optim.AdamW(net.parameters(), 2e-3)


def rows(n):
    for _ in range(n):
        question = [random.randrange(4, 48) for _ in range(random.randint(3, 9))]
        answer = sorted(question)
        yield [BOS, *question, SEP], [*answer, EOS]


def collate(items):
    width = max(len(a) + len(b) for a, b in items)
    ids, lab, att = [], [], []
    for a, b in items:
        space = width - len(a) - len(b)
        x, m = a + b, [1] * (len(a) + len(b))
        y = {"answer": [-100] * len(a) + b, "all": x, "pads": x, "notpad": [t if t != PAD else -100 for t in x], "none": [-100] * len(x)}[
            q.labels
        ]
        fill = [PAD] * space
        skip = fill if q.labels == "pads" else [-100] * space
        if q.side == "left":
            ids.append(fill + x), lab.append(skip + y), att.append([0] * space + m)
        else:
            ids.append(x + fill), lab.append(y + skip), att.append(m + [0] * space)
    return torch.tensor(ids), torch.tensor(lab), torch.tensor(att)


net.train()
for step in range(50):
    ids, lab, att = collate(list(rows(16)))
    extra = {} if q.attention == "no" else {"attention_mask": att}
    if q.positions == "explicit":
        extra["position_ids"] = (att.cumsum(1) - 1).clamp(min=0)
    loss = net(input_ids=ids, labels=lab, **extra).loss
    opt.zero_grad()
    loss.backward()
    torch.nn.utils.clip_grad_norm_(net.parameters(), 1.0)
    opt.step()
    if step % 25 == 24:
        net.eval()
        with torch.no_grad():
            ids, _, att = collate([(a, []) for a, _ in rows(4)])
            made = net.generate(input_ids=ids, attention_mask=att, max_new_tokens=8, do_sample=False, pad_token_id=PAD)
        net.train()
        print(step, round(loss.item(), 3), made[0].tolist())
