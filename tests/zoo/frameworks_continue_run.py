"""Train, save everything, load it into new objects and go on; also the ways in which that is forgotten."""

import sys
import tempfile
from pathlib import Path

import torch
from transformers import LlamaConfig, LlamaForCausalLM

torch.set_num_threads(1)
torch.manual_seed(0)
how = sys.argv[1] if len(sys.argv) > 1 else "all"
text = (Path(__file__).resolve().parents[2] / "examples/data/tinyshakespeare.txt").read_bytes()[:40_000]
stream = torch.frombuffer(bytearray(text), dtype=torch.uint8).long()
cfg = LlamaConfig(
    vocab_size=128,
    hidden_size=48,
    intermediate_size=96,
    num_hidden_layers=2,
    num_attention_heads=4,
    tie_word_embeddings=True,
    bos_token_id=0,
    eos_token_id=1,
)


def start():
    model = LlamaForCausalLM(cfg)
    return model, torch.optim.AdamW(model.parameters(), lr=2e-3, fused=how == "fused")


def go(model, opt, steps, seed):
    picks = torch.Generator().manual_seed(seed)
    model.train()
    for n in range(steps):
        at = torch.randint(len(stream) - 33, (8,), generator=picks)
        x = stream[at[:, None] + torch.arange(33)]
        logits = model(x[:, :-1]).logits
        loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), x[:, 1:].flatten())
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        opt.step()
        opt.zero_grad(set_to_none=True)
        if n % 10 == 9:
            print(n, loss.item())


with tempfile.TemporaryDirectory() as folder:
    model, opt = start()
    go(model, opt, 25, 1)
    torch.save({"model": model.state_dict(), "opt": opt.state_dict()}, f"{folder}/ck.pt")
    old = opt
    model, opt = start()
    saved = torch.load(f"{folder}/ck.pt")
    if how == "untied":
        model.lm_head.weight = torch.nn.Parameter(saved["model"]["lm_head.weight"].clone())
        opt = torch.optim.AdamW(model.parameters(), lr=2e-3)
    model.load_state_dict(saved["model"])
    if how == "nan":
        model.model.layers[1].mlp.down_proj.weight.data[3, 4] = float("nan")
    if how != "untied":
        opt.load_state_dict(saved["opt"])
    go(model, old if how == "oldopt" else opt, 25, 2)
