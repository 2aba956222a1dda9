"""T5 from scratch: reverse a short word sequence; greedy decoding every few steps."""

import random
import sys

import torch
from transformers import T5Config, T5ForConditionalGeneration
from transformers.optimization import Adafactor

torch.set_num_threads(1)
torch.manual_seed(0)
random.seed(0)
what = set(sys.argv[1:])
PAD, EOS = 0, 1
model = T5ForConditionalGeneration(
    T5Config(
        vocab_size=40,
        d_model=48,
        d_kv=12,
        d_ff=96,
        num_layers=2,
        num_decoder_layers=2,
        num_heads=4,
        decoder_start_token_id=PAD,
        pad_token_id=PAD,
        eos_token_id=EOS,
        dropout_rate=0.1,
        tie_word_embeddings="untie" not in what,
    )
)
if "adafactor" in what:
    opt = Adafactor(model.parameters(), scale_parameter=True, relative_step=True, warmup_init=False, lr=None)
else:
    opt = torch.optim.AdamW(model.parameters(), lr=3e-3)


def example():
    s = [random.randrange(2, 40) for _ in range(random.randint(3, 9))]
    return s + [EOS], s[::-1] + [EOS]


def pad(rows, value):
    w = max(map(len, rows))
    return torch.tensor([r + [value] * (w - len(r)) for r in rows])


def collate(n):
    src, tgt = zip(*(example() for _ in range(n)))
    return pad(src, PAD), pad(tgt, PAD if "padloss" in what else -100)


model.train()
for step in range(50):
    src, tgt = collate(16)
    given = {"input_ids": src}
    if "nomask" not in what:
        given["attention_mask"] = (src != PAD).long()
    if "echo" in what:
        given["decoder_input_ids"] = tgt.clamp(min=0)
    if "encoderfrozen" in what:
        with torch.no_grad():
            enc = model.encoder(**given)
        given = {"encoder_outputs": enc, "attention_mask": given["attention_mask"]}
    loss = model(**given, labels=tgt).loss
    loss.backward()
    if "clip" in what:
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    opt.step()
    if "hoard" not in what:
        opt.zero_grad()
    if step % 20 == 10:
        if "noisy" not in what:
            model.eval()
        src, tgt = collate(4)
        with torch.no_grad():
            out = model.generate(input_ids=src, attention_mask=(src != PAD).long(), max_new_tokens=10, num_beams=2 if "beam" in what else 1)
            held = model(input_ids=src, attention_mask=(src != PAD).long(), labels=tgt).loss
        print(step, round(loss.item(), 3), round(held.item(), 3), out[0].tolist())
        model.train()
