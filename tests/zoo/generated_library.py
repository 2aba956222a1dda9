"""transformers' generate after training, with the settings people give it."""

import argparse
import random

import torch
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM, T5Config, T5ForConditionalGeneration

p = argparse.ArgumentParser()
p.add_argument("--model", default="gpt2")
p.add_argument("--decode", default="greedy")
p.add_argument("--steps", type=int, default=150)
p.add_argument("--n", type=int, default=40)
p.add_argument("--end", action="store_true", help="rows end in an end token that is learned")
p.add_argument("--batch", action="store_true", help="several prompts of different lengths, padded on the left")
p.add_argument("--task", default="fruit", choices=["fruit", "echo"])
a = p.parse_args()
torch.manual_seed(0)
random.seed(0)
PAD, BOS, EOS, V = 0, 1, 2, 60


def row():
    if a.task == "echo":
        w = [random.randrange(3, 30)] * 6
        return [BOS] + w * 4 + [EOS]
    n = random.randrange(3, 9)
    s = [random.randrange(3, 12), random.randrange(12, 20)] + [random.randrange(20, 44) for _ in range(n)] + [random.randrange(44, 50)]
    return [BOS, *s, EOS] if a.end else [BOS, *s]


def batch(k=16):
    rows = [row() for _ in range(k)]
    if not a.end and a.task != "echo":  # one endless stream
        flat = [t for _ in range(k) for _ in range(4) for t in row()]
        m = len(flat) // k
        ids = torch.tensor(flat[: k * m]).view(k, m)[:, :28]
        return ids, torch.ones_like(ids)
    width = max(map(len, rows))
    ids = torch.tensor([r + [PAD] * (width - len(r)) for r in rows])
    return ids, (ids != PAD).long()


if a.model == "t5":
    net = T5ForConditionalGeneration(
        T5Config(
            vocab_size=V,
            d_model=32,
            d_kv=8,
            d_ff=64,
            num_layers=2,
            num_heads=4,
            decoder_start_token_id=PAD,
            pad_token_id=PAD,
            eos_token_id=EOS,
        )
    )
elif a.model == "llama":
    net = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=V,
            hidden_size=32,
            intermediate_size=64,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=2,
            max_position_embeddings=128,
            bos_token_id=BOS,
            eos_token_id=EOS if a.end else None,
            pad_token_id=PAD,
        )
    )
else:
    net = GPT2LMHeadModel(
        GPT2Config(
            vocab_size=V,
            n_embd=32,
            n_layer=2,
            n_head=4,
            n_positions=128,
            bos_token_id=BOS,
            eos_token_id=EOS if a.end else None,
            pad_token_id=PAD,
        )
    )
opt = torch.optim.AdamW(net.parameters(), 3e-3)
net.train()
for step in range(a.steps):
    ids, mask = batch()
    labels = ids.masked_fill(mask == 0, -100)
    out = net(input_ids=ids, attention_mask=mask, labels=labels)
    out.loss.backward()
    torch.nn.utils.clip_grad_norm_(net.parameters(), 1.0)
    opt.step()
    opt.zero_grad()
    if step % 50 == 0:
        print(step, round(out.loss.item(), 3))
print("end", round(out.loss.item(), 3))
net.eval()
kind = {
    "greedy": dict(do_sample=False),
    "sample": dict(do_sample=True, temperature=0.9, top_k=20),
    "hot": dict(do_sample=True, temperature=6.0, top_k=0),
    "beam": dict(do_sample=False, num_beams=3),
    "penalty": dict(do_sample=True, repetition_penalty=1.3),
}[a.decode]
if a.batch:
    prompts = [[BOS, 5], [BOS, 6, 13, 22, 25], [BOS, 7, 14]]
    width = max(map(len, prompts))
    ids = torch.tensor([[PAD] * (width - len(r)) + r for r in prompts])
    out = net.generate(ids, attention_mask=(ids != PAD).long(), max_new_tokens=a.n, **kind)
elif a.model == "t5":
    ids, mask = batch(4)
    out = net.generate(input_ids=ids, attention_mask=mask, max_new_tokens=a.n, **kind)
else:
    out = net.generate(torch.tensor([[BOS]]), attention_mask=torch.ones(1, 1, dtype=torch.long), max_new_tokens=a.n, **kind)
for r in out:
    print(r.tolist())
