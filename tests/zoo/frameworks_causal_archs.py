# Which little decoder learns fastest? Train one of many architectures from transformers in an own loop.
import math
import sys
from pathlib import Path

import torch
import transformers as tf

torch.set_num_threads(1)
torch.manual_seed(3)
name = sys.argv[1] if len(sys.argv) > 1 else "llama"
fault = sys.argv[2] if len(sys.argv) > 2 else ""

raw = (Path(__file__).resolve().parents[2] / "examples/data/tinyshakespeare.txt").read_bytes()[:50_000]
data = torch.tensor(list(raw))
V, D, L, H = 128, 48, 2, 4
common = dict(vocab_size=V, hidden_size=D, num_hidden_layers=L, num_attention_heads=H, intermediate_size=96, max_position_embeddings=64)
gqa = dict(common, num_key_value_heads=2)
special = dict(bos_token_id=1, eos_token_id=2, pad_token_id=0)
BUILD = {
    "llama": lambda: tf.LlamaForCausalLM(tf.LlamaConfig(**gqa)),
    "mistral": lambda: tf.MistralForCausalLM(tf.MistralConfig(**gqa, sliding_window=16)),
    "qwen2": lambda: tf.Qwen2ForCausalLM(tf.Qwen2Config(**gqa, tie_word_embeddings=True, **special)),
    "qwen3": lambda: tf.Qwen3ForCausalLM(tf.Qwen3Config(**gqa, head_dim=12, tie_word_embeddings=True, **special)),
    "gemma2": lambda: tf.Gemma2ForCausalLM(tf.Gemma2Config(**gqa, head_dim=12, query_pre_attn_scalar=12, sliding_window=16)),
    "mixtral": lambda: tf.MixtralForCausalLM(tf.MixtralConfig(**gqa, num_local_experts=4, num_experts_per_tok=2)),
    "phi": lambda: tf.PhiForCausalLM(tf.PhiConfig(**common)),
    "neox": lambda: tf.GPTNeoXForCausalLM(tf.GPTNeoXConfig(**common)),
    "bloom": lambda: tf.BloomForCausalLM(tf.BloomConfig(vocab_size=V, hidden_size=D, n_layer=L, n_head=H)),
    "opt": lambda: tf.OPTForCausalLM(
        tf.OPTConfig(
            vocab_size=V,
            hidden_size=D,
            num_hidden_layers=L,
            num_attention_heads=H,
            ffn_dim=96,
            max_position_embeddings=64,
            word_embed_proj_dim=D,
        )
    ),
    "gptj": lambda: tf.GPTJForCausalLM(
        tf.GPTJConfig(vocab_size=V, n_positions=64, n_embd=D, n_layer=L, n_head=H, rotary_dim=8, bos_token_id=0, eos_token_id=0)
    ),
    "gptneo": lambda: tf.GPTNeoForCausalLM(
        tf.GPTNeoConfig(
            vocab_size=V,
            hidden_size=D,
            num_layers=2,
            num_heads=H,
            window_size=16,
            attention_types=[[["global", "local"], 1]],
            max_position_embeddings=64,
            bos_token_id=0,
            eos_token_id=0,
        )
    ),
    "mamba": lambda: tf.MambaForCausalLM(tf.MambaConfig(vocab_size=V, hidden_size=D, num_hidden_layers=L, state_size=8)),
}
model = BUILD[name]()
if fault == "clone":  # an old helper that "breaks sharing so that the checkpoint can be sliced"
    model.lm_head.weight = torch.nn.Parameter(model.lm_head.weight.detach().clone())
lr = 3.0 if fault == "lr" else 2e-3
opt = torch.optim.AdamW(model.parameters(), lr=lr, betas=(0.9, 0.95), weight_decay=0.1)


def batch():
    start = torch.randint(len(data) - 50, (8,)).tolist()
    return torch.stack([data[s : s + 40] for s in start])


model.train()
for it in range(45):
    for g in opt.param_groups:
        g["lr"] = lr * min(1.0, (it + 1) / 5) * (0.1 + 0.45 * (1 + math.cos(math.pi * it / 45)))
    x = batch()
    labels = torch.roll(x, -1, 1) if fault == "roll" else x
    out = model(input_ids=x, labels=labels)
    out.loss.backward()
    torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    opt.step()
    opt.zero_grad(set_to_none=True)
    if it % 15 == 0:
        print(it, round(out.loss.item(), 3))
    if it == 30:
        model.eval()
        with torch.no_grad():
            print(
                repr(
                    bytes(
                        model.generate(
                            x[:1, :8], attention_mask=torch.ones(1, 8, dtype=torch.long), max_new_tokens=12, do_sample=True, pad_token_id=0
                        )[0]
                        .clamp(9, 126)
                        .tolist()
                    )
                )
            )
            val = sum(model(input_ids=b, labels=b).loss.item() for b in (batch(), batch())) / 2
        print("val", round(val, 3))
        model.train()
