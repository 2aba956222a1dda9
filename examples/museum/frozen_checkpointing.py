"""Fine-tuning with frozen embeddings and gradient checkpointing: the blocks receive no gradient at all.

Reentrant checkpointing runs its forward under no_grad and builds a graph only if one of its inputs needs a gradient. With frozen embeddings
no input does. "Gradient checkpointing + frozen first parameter = error", says the report; where nothing after the blocks can learn,
backward raises. Others met only the warning "None of the inputs have requires_grad=True. Gradients will be None" and a loss that looked
normal, because the head could still learn; so it is here. Repair: let the embeddings' output ask for a gradient.

Thread: https://github.com/huggingface/transformers/issues/23170
Thread: https://github.com/hiyouga/LlamaFactory/issues/4905
Condition: missing-gradient
"""

import sys
from pathlib import Path

import torch
from torch import nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

FIXED = "fixed" in sys.argv[1:]
DIM, HEADS, LAYERS, CONTEXT, BATCH, STEPS = 48, 4, 3, 48, 8, 60

text = (Path(__file__).resolve().parent.parent / "data" / "tinyshakespeare.txt").read_text()[:100_000]
characters = sorted(set(text))
data = torch.tensor([characters.index(c) for c in text])


class Layer(nn.Module):
    def __init__(self):
        super().__init__()
        self.input_norm, self.post_norm = nn.LayerNorm(DIM), nn.LayerNorm(DIM)
        self.qkv_proj, self.o_proj = nn.Linear(DIM, 3 * DIM, bias=False), nn.Linear(DIM, DIM, bias=False)
        self.mlp = nn.Sequential(nn.Linear(DIM, 3 * DIM), nn.SiLU(), nn.Linear(3 * DIM, DIM))

    def forward(self, x):
        B, T, _ = x.shape
        q, k, v = self.qkv_proj(self.input_norm(x)).view(B, T, 3, HEADS, DIM // HEADS).permute(2, 0, 3, 1, 4)
        x = x + self.o_proj(F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2).reshape(B, T, DIM))
        return x + self.mlp(self.post_norm(x))


class Model(nn.Module):
    def __init__(self):
        super().__init__()
        self.embed_tokens, self.embed_positions = nn.Embedding(len(characters), DIM), nn.Embedding(CONTEXT, DIM)
        self.layers = nn.ModuleList(Layer() for _ in range(LAYERS))
        self.norm, self.lm_head = nn.LayerNorm(DIM), nn.Linear(DIM, len(characters), bias=False)
        self.gradient_checkpointing = False

    def enable_input_require_grads(self):
        self.embed_tokens.register_forward_hook(lambda module, inputs, output: output.requires_grad_(True))

    def forward(self, input_ids):
        hidden = self.embed_tokens(input_ids) + self.embed_positions(torch.arange(input_ids.shape[1]))
        for layer in self.layers:
            if self.gradient_checkpointing and self.training:
                hidden = checkpoint(layer, hidden, use_reentrant=True)
            else:
                hidden = layer(hidden)
        return self.lm_head(self.norm(hidden))


torch.manual_seed(0)
model = Model()
model.embed_tokens.requires_grad_(False)
model.embed_positions.requires_grad_(False)
model.gradient_checkpointing = True
if FIXED:
    model.enable_input_require_grads()

optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=2e-3)
for step in range(STEPS):
    starts = torch.randint(len(data) - CONTEXT - 1, (BATCH,))
    batch = torch.stack([data[s : s + CONTEXT + 1] for s in starts])
    loss = F.cross_entropy(model(batch[:, :-1]).flatten(0, 1), batch[:, 1:].flatten())
    loss.backward()
    nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    optimizer.step()
    optimizer.zero_grad()
    if step % 20 == 19:
        print(f"step {step + 1}: loss {loss.item():.3f}")
