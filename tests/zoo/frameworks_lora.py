"""Low-rank adapters, written by hand, on a frozen GPT-2 / Llama."""

import math
import sys

import torch
from torch import nn
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM

torch.set_num_threads(1)
torch.manual_seed(0)
base = sys.argv[1] if len(sys.argv) > 1 else "llama"
bug = sys.argv[2] if len(sys.argv) > 2 else ""


class LoRALinear(nn.Module):
    def __init__(self, inner: nn.Module, n_in: int, n_out: int, r: int = 4, alpha: int = 8) -> None:
        super().__init__()
        self.inner, self.scaling = inner, alpha / r
        self.A = nn.Parameter(torch.empty(r, n_in))
        self.B = nn.Parameter(torch.zeros(n_out, r))
        nn.init.kaiming_uniform_(self.A, a=math.sqrt(5))

    def forward(self, x):
        y = self.inner(x)
        if bug == "nograd":
            with torch.no_grad():
                return y + (x @ self.A.T @ self.B.T) * self.scaling
        return y + (x @ self.A.T @ self.B.T) * self.scaling


if base == "gpt2":
    model = GPT2LMHeadModel(GPT2Config(vocab_size=64, n_positions=48, n_embd=48, n_layer=2, n_head=4, bos_token_id=0, eos_token_id=0))
else:
    model = LlamaForCausalLM(LlamaConfig(vocab_size=64, hidden_size=48, intermediate_size=96, num_hidden_layers=2, num_attention_heads=4))
if bug != "unfrozen":
    model.requires_grad_(False)
for blk in model.transformer.h if base == "gpt2" else model.model.layers:
    if base == "gpt2":
        blk.attn.c_attn = LoRALinear(blk.attn.c_attn, 48, 144)
    else:
        blk.self_attn.q_proj = LoRALinear(blk.self_attn.q_proj, 48, 48)
        blk.self_attn.v_proj = LoRALinear(blk.self_attn.v_proj, 48, 48)
if bug in ("checkpoint", "checkpoint-ok"):
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": True})
    if bug == "checkpoint-ok":
        model.enable_input_require_grads()
    else:
        model.lm_head.requires_grad_(True)
adapters = [p for n, p in model.named_parameters() if n.endswith((".A", ".B"))]
if bug == "onlyA":
    adapters = [p for n, p in model.named_parameters() if n.endswith(".A")]
if bug in ("checkpoint",):
    adapters += list(model.lm_head.parameters())
opt = torch.optim.AdamW(adapters, lr=5e-3, weight_decay=0.0)
model.train()
for it in range(50):
    start, stride = torch.randint(64, (16, 1)), torch.randint(1, 4, (16, 1))
    seq = (start + stride * torch.arange(24)) % 64
    loss = model(input_ids=seq, labels=seq).loss
    opt.zero_grad()
    if bug == "item":
        loss = torch.tensor(loss.item())
    loss.backward()
    torch.nn.utils.clip_grad_norm_(adapters, 1.0)
    opt.step()
    if it % 10 == 0:
        print(it, loss.item())
torch.save({k: v for k, v in model.state_dict().items() if k.endswith((".A", ".B"))}, "/dev/null")
