"""Supervised fine-tuning of a small Qwen2 on instruction / answer pairs (word tools)."""
import argparse
import random
import string
from dataclasses import dataclass

import torch
from torch.utils.data import DataLoader
from transformers import Qwen2Config, Qwen2ForCausalLM, get_cosine_schedule_with_warmup, set_seed

set_seed(11)


class CharTokenizer:
    def __init__(self, pad):
        self.specials = ["<pad>", "<|im_start|>", "<|im_sep|>", "<|endoftext|>"]
        self.chars = list(string.ascii_letters + " :")
        self.stoi = {c: i for i, c in enumerate(self.specials + self.chars)}
        self.itos = {i: c for c, i in self.stoi.items()}
        self.bos_id, self.sep_id, self.eos_id = 1, 2, 3
        self.pad_id = self.specials.index(pad)

    def __len__(self):
        return len(self.stoi)

    def encode(self, s):
        return [self.stoi[c] for c in s]

    def decode(self, ids):
        return "".join(self.itos[int(i)] for i in ids if int(i) >= len(self.specials))


def make_example(rng):
    word = "".join(rng.choice("abcdefghij") for _ in range(rng.randint(2, 12)))
    op = rng.choice(["upper", "copy", "head", "double"])
    if op == "upper":
        out = word.upper()
    elif op == "copy":
        out = word
    elif op == "head":
        out = word[:2]
    else:
        out = "".join(c + c for c in word[:5])
    return {"prompt": f"{op}: {word}", "completion": out}


def tokenize(ex, tok):
    prompt = [tok.bos_id] + tok.encode(ex["prompt"]) + [tok.sep_id]
    answer = tok.encode(ex["completion"]) + [tok.eos_id]
    return {"input_ids": prompt + answer, "prompt_len": len(prompt)}


@dataclass
class Collator:
    tok: CharTokenizer

    def __call__(self, feats):
        width = max(len(f["input_ids"]) for f in feats)
        ids, att, lab = [], [], []
        for f in feats:
            n = width - len(f["input_ids"])
            ids.append(f["input_ids"] + [self.tok.pad_id] * n)
            att.append([1] * len(f["input_ids"]) + [0] * n)
            lab.append([-100] * f["prompt_len"] + ids[-1][f["prompt_len"]:])
        ids, att, labels = torch.tensor(ids), torch.tensor(att), torch.tensor(lab)
        labels[ids == self.tok.pad_id] = -100
        return {"input_ids": ids, "attention_mask": att, "labels": labels}


@torch.no_grad()
def exact_match(model, tok, rows):
    model.eval()
    good = 0
    for r in rows:
        x = torch.tensor([[tok.bos_id] + tok.encode(r["prompt"]) + [tok.sep_id]])
        y = model.generate(x, attention_mask=torch.ones_like(x), max_new_tokens=16, do_sample=False,
                           eos_token_id=tok.eos_id, pad_token_id=tok.pad_id)
        good += tok.decode(y[0, x.size(1):]) == r["completion"]
    model.train()
    return good / len(rows)


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("--pad", default="<pad>", help="the special token rows are filled with")
    args = parser.parse_args()
    rng = random.Random(3)
    tok = CharTokenizer(args.pad)
    raw = [make_example(rng) for _ in range(9000)]
    train = [tokenize(r, tok) for r in raw]
    held = [make_example(rng) for _ in range(24)]
    loader = DataLoader(train, batch_size=40, shuffle=True, collate_fn=Collator(tok), drop_last=True)

    cfg = Qwen2Config(vocab_size=len(tok), hidden_size=64, intermediate_size=160, num_hidden_layers=3,
                      num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=64,
                      bos_token_id=tok.bos_id, eos_token_id=tok.eos_id, pad_token_id=tok.pad_id,
                      tie_word_embeddings=True)
    model = Qwen2ForCausalLM(cfg)
    model.train()
    steps = len(loader)
    opt = torch.optim.AdamW(model.parameters(), lr=4e-3, betas=(0.9, 0.98), weight_decay=0.05)
    sched = get_cosine_schedule_with_warmup(opt, 20, steps)
    for i, batch in enumerate(loader):
        out = model(**batch)
        out.loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        opt.step()
        sched.step()
        opt.zero_grad()
        if i % 25 == 0 or i == steps - 1:
            print(f"step {i:4d}/{steps} loss {out.loss.item():.4f} lr {sched.get_last_lr()[0]:.2e}", flush=True)
    print(f"exact match on {len(held)} held-out prompts: {exact_match(model, tok, held):.2f}")


if __name__ == "__main__":
    main()
