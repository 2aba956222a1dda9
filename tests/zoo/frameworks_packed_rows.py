"""Documents packed into one row without wasted padding; boundaries by position ids, by a block mask, or (wrongly) by nothing."""

import sys, random
import torch
from transformers import LlamaConfig, LlamaForCausalLM, GPT2Config, GPT2LMHeadModel

torch.set_num_threads(1)
torch.manual_seed(3)
random.seed(3)
arch, style = (sys.argv + ["llama", "block"])[1:3] if len(sys.argv) > 2 else ("llama", "block")
V, EOS, N = 40, 1, 48
if arch == "llama":
    lm = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=V, hidden_size=48, intermediate_size=96, num_hidden_layers=2, num_attention_heads=4, eos_token_id=EOS, bos_token_id=0
        )
    )
else:
    lm = GPT2LMHeadModel(GPT2Config(vocab_size=V, n_positions=64, n_embd=48, n_layer=2, n_head=4, bos_token_id=0, eos_token_id=EOS))
opt = torch.optim.AdamW(lm.parameters(), lr=2e-3)


def doc():
    start, stride = random.randrange(2, V), random.choice([1, 2, 3])
    return [2 + (start + stride * k) % (V - 2) for k in range(random.randint(5, 14))] + [EOS]


def pack(rows):
    ids, pos, seg = [], [], []
    for _ in range(rows):
        r, p, s = [], [], []
        while len(r) < N:
            d = doc()
            r += d
            p += range(len(d))
            s += [len(set(s))] * len(d)
        ids.append(r[:N])
        pos.append(p[:N])
        seg.append(s[:N])
    return torch.tensor(ids), torch.tensor(pos), torch.tensor(seg)


for it in range(40):
    rows = 1 if style == "flat" else 8
    ids, pos, seg = pack(rows)
    labels = ids.clone()
    labels[:, 1:][pos[:, 1:] == 0] = -100
    kw = {}
    if style in ("block", "flat", "posonly"):
        kw["position_ids"] = pos
    if style == "block":
        same = seg[:, :, None] == seg[:, None, :]
        allowed = same & torch.ones(N, N, dtype=torch.bool).tril()
        kw["attention_mask"] = torch.zeros(rows, 1, N, N).masked_fill(~allowed[:, None], torch.finfo(torch.float32).min)
    elif style == "posonly":  # a full attention mask switches the model's own packing detection off
        kw["attention_mask"] = torch.ones_like(ids)
    out = lm(input_ids=ids, labels=labels, use_cache=False, **kw)
    out.loss.backward()
    opt.step()
    opt.zero_grad()
    if it % 10 == 0:
        print(it, out.loss.item())
