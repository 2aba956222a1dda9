"""A character model in one file; `--init` draws its weights in different ways, `--head` ends it in different ways."""

import argparse
import math

import torch
import torch.nn as nn
import torch.nn.functional as F

args = argparse.ArgumentParser()
args.add_argument("--init", default="gpt")
args.add_argument("--head", default="plain")
args.add_argument("--steps", type=int, default=40)
args.add_argument("--layers", type=int, default=3)
args = args.parse_args()
torch.manual_seed(1)
torch.set_num_threads(1)
W, CTX, V = 48, 24, 29
text = torch.tensor([(i * i + 3 * i + (i // 7) % 5) % V for i in range(6000)])


class Scale(nn.Module):
    def __init__(self, value):
        super().__init__()
        self.gain = nn.Parameter(torch.full((W,), float(value)))

    def forward(self, x):
        return x * self.gain


class Layer(nn.Module):
    def __init__(self):
        super().__init__()
        self.n1, self.n2 = nn.LayerNorm(W), nn.LayerNorm(W)
        self.qkv, self.out = nn.Linear(W, 3 * W), nn.Linear(W, W)
        self.up, self.down = nn.Linear(W, 4 * W), nn.Linear(4 * W, W)
        start = {"rezero": 0.0, "layerscale": 1e-6}.get(args.init, 1.0)
        self.s1, self.s2 = Scale(start), Scale(start)

    def forward(self, x):
        b, t, _ = x.shape
        q, k, v = self.qkv(self.n1(x)).view(b, t, 3, 4, W // 4).permute(2, 0, 3, 1, 4)
        mixed = F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2).reshape(b, t, W)
        x = x + self.s1(self.out(mixed))
        return x + self.s2(self.down(F.gelu(self.up(self.n2(x)))))


class CharModel(nn.Module):
    def __init__(self):
        super().__init__()
        self.tok, self.pos = nn.Embedding(V, W), nn.Embedding(CTX, W)
        self.layers = nn.ModuleList(Layer() for _ in range(args.layers))
        self.norm, self.score = nn.LayerNorm(W), nn.Linear(W, V, bias=False)
        if args.init in ("tied-unit", "gpt-tied"):
            self.score.weight = self.tok.weight
        for name, p in self.named_parameters():
            if p.dim() < 2:
                continue
            if args.init in ("gpt", "gpt-tied", "rezero", "layerscale", "resumed"):
                nn.init.normal_(p, 0.0, 0.02 / math.sqrt(2 * args.layers) if name.endswith(("out.weight", "down.weight")) else 0.02)
            elif args.init == "unit":
                nn.init.normal_(p)
            elif args.init == "rand":
                nn.init.uniform_(p, 0.0, 1.0)
            elif args.init == "constant":
                nn.init.constant_(p, 0.05)
            elif args.init == "allzero":
                nn.init.zeros_(p)
            elif args.init == "twice":
                with torch.no_grad():
                    p.normal_(0.0, 0.02).mul_(math.sqrt(2 / W))
            elif args.init == "xavier":
                nn.init.xavier_uniform_(p)
            elif args.init == "kaiming":
                nn.init.kaiming_normal_(p)
            elif args.init == "orthogonal":
                nn.init.orthogonal_(p)
            elif args.init == "muP":
                nn.init.normal_(p, 0.0, 1 / W if name.startswith("score") else 1 / math.sqrt(p.shape[1]))
            elif args.init == "zero-outputs" and name.endswith(("out.weight", "down.weight", "score.weight")):
                nn.init.zeros_(p)
            elif args.init == "loud-residual" and name.endswith(("out.weight", "down.weight")):
                nn.init.normal_(p, 0.0, 0.02 * 4.0 ** (2 + int(name.split(".")[1])))
        if args.init == "clone-mlp":
            for layer in self.layers:
                for part in (layer.up, layer.down):
                    nn.init.constant_(part.weight, 0.01)
                    nn.init.zeros_(part.bias)

    def forward(self, ids):
        x = self.tok(ids) + self.pos(torch.arange(ids.shape[1]))
        for layer in self.layers:
            x = layer(x)
        scores = self.score(self.norm(x))
        if args.head == "cap30":
            return 30 * torch.tanh(scores / 30)
        if args.head == "cap8":
            return torch.tanh(scores / 8) * 8
        if args.head == "tanh":
            return torch.tanh(scores)
        if args.head == "sigmoid":
            return scores.sigmoid()
        if args.head == "softmax":
            return scores.softmax(-1)
        if args.head == "clamp":
            return scores.clamp(-1.0, 1.0)
        if args.head in ("logsoftmax", "logprob-nll"):
            return scores.log_softmax(-1)
        if args.head == "log-of-softmax":
            return torch.log(scores.softmax(-1) + 1e-9)
        if args.head == "prob-nll":
            return scores.softmax(-1)
        return scores


model = CharModel()
if args.init == "resumed":
    rotation = torch.linalg.qr(torch.randn(W, W)).Q
    direction = rotation[:, :1] @ torch.randn(1, W)
    state = model.state_dict()
    for key, value in state.items():
        if value.dim() == 2 and value.shape[1] == W and not key.startswith("pos"):
            learned = 3.0 * direction if value.shape[0] <= W else 0.5 * direction.repeat(4, 1)
            state[key] = value + learned[: value.shape[0]]
    state["score.weight"] = state["score.weight"] * 20
    model.load_state_dict(state)
optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
for _ in range(args.steps):
    at = torch.randint(0, len(text) - CTX - 1, (16,))
    x = torch.stack([text[i : i + CTX] for i in at])
    y = torch.stack([text[i + 1 : i + 1 + CTX] for i in at])
    scores = model(x)
    if args.head.endswith("nll"):
        loss = F.nll_loss(scores.flatten(0, 1), y.flatten())
    elif args.head == "smoothed":
        loss = F.cross_entropy(scores.transpose(1, 2), y, label_smoothing=0.1)
    elif args.head == "gathered":
        loss = -scores.log_softmax(-1).gather(-1, y.unsqueeze(-1)).mean()
    elif args.head == "gathered-softmax":
        loss = -scores.softmax(-1).log_softmax(-1).gather(-1, y.unsqueeze(-1)).mean()
    elif args.head == "summed":
        loss = F.cross_entropy(scores.flatten(0, 1), y.flatten(), reduction="sum")
    else:
        loss = F.cross_entropy(scores.flatten(0, 1), y.flatten())
    optimizer.zero_grad()
    loss.backward()
    nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    optimizer.step()
print(f"last loss {loss.item():.3f}")
