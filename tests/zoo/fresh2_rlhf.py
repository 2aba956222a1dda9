"""PPO on a tiny language model with a value head and a frozen reference: sampled answers are rewarded for vowels."""

from __future__ import annotations

import copy
import sys
from dataclasses import dataclass

import torch
from torch import nn
from torch.distributions import Categorical

LETTERS = "abcdefghijklmnopqrstuvwxyz "
VOWELS = torch.tensor([float(c in "aeiou") for c in LETTERS])


@dataclass
class Args:
    fault: str = ""
    rollouts: int = 24
    batch: int = 16
    length: int = 16
    minibatches: int = 2
    ppo_epochs: int = 2
    kl: float = 0.05
    clip: float = 0.2


class Policy(nn.Module):
    def __init__(self, vocab: int, dim: int = 48, drop: float = 0.0) -> None:
        super().__init__()
        self.embed = nn.Embedding(vocab + 1, dim)
        self.where = nn.Embedding(64, dim)
        self.blocks = nn.ModuleList(
            [nn.TransformerEncoderLayer(dim, 4, 2 * dim, drop, "gelu", batch_first=True, norm_first=True) for _ in range(2)]
        )
        self.norm = nn.LayerNorm(dim)
        self.head = nn.Linear(dim, vocab)
        self.value = nn.Linear(dim, 1)

    def forward(self, ids: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        t = ids.size(1)
        mask = nn.Transformer.generate_square_subsequent_mask(t)
        x = self.embed(ids) + self.where.weight[:t]
        for block in self.blocks:
            x = block(x, src_mask=mask, is_causal=True)
        x = self.norm(x)
        return self.head(x), self.value(x)


@torch.no_grad()
def sample(policy: Policy, batch: int, length: int, bos: int) -> torch.Tensor:
    ids = torch.full((batch, 1), bos)
    for _ in range(length):
        logits, _ = policy(ids)
        ids = torch.cat([ids, Categorical(logits=logits[:, -1]).sample()[:, None]], 1)
    return ids


def log_probs(logits: torch.Tensor, actions: torch.Tensor, fault: str) -> torch.Tensor:
    if fault == "logsoft":
        return torch.log((logits / 0.01).softmax(-1)).gather(-1, actions[..., None])[..., 0]
    return logits.log_softmax(-1).gather(-1, actions[..., None])[..., 0]


def gae(rewards: torch.Tensor, values: torch.Tensor, gamma: float = 1.0, lam: float = 0.95) -> torch.Tensor:
    out, carry = torch.zeros_like(rewards), torch.zeros(rewards.size(0))
    for t in reversed(range(rewards.size(1))):
        after = values[:, t + 1] if t + 1 < rewards.size(1) else 0.0
        carry = rewards[:, t] + gamma * after - values[:, t] + gamma * lam * carry
        out[:, t] = carry
    return out


def main(args: Args) -> None:
    torch.manual_seed(3)
    torch.set_num_threads(1)
    bos = len(LETTERS)
    policy = Policy(len(LETTERS), drop=0.1 if args.fault in ("dropout", "modes") else 0.0)
    reference = copy.deepcopy(policy).eval().requires_grad_(False)
    adam = torch.optim.Adam(policy.parameters(), lr=1e-3, eps=1e-5)
    for rollout in range(args.rollouts):
        if args.fault != "dropout":
            policy.eval()
        ids = sample(policy, args.batch, args.length, bos)
        with torch.no_grad():
            logits, values = policy(ids[:, :-1])
            old = log_probs(logits, ids[:, 1:], "")
            values = values[..., 0]
            drift = old - log_probs(reference(ids[:, :-1])[0], ids[:, 1:], "")
            rewards = -args.kl * drift
            score = VOWELS[ids[:, 1:]].mean(1)
            rewards[:, -1] += score
            advantage = gae(rewards, values)
            returns = advantage + values
            advantage = (advantage - advantage.mean()) / (advantage.std() + 1e-8)
        policy.train()
        for _ in range(args.ppo_epochs):
            for rows in torch.randperm(args.batch).chunk(args.minibatches):
                logits, value = policy(ids[rows, :-1])
                new = log_probs(logits, ids[rows, 1:], args.fault)
                ratio = (new - old[rows]).exp()
                adv = advantage[rows]
                surrogate = torch.min(ratio * adv, ratio.clamp(1 - args.clip, 1 + args.clip) * adv)
                if args.fault == "broadcast":
                    mistake = value.mean(1) - returns[rows].mean(1)
                else:
                    mistake = value[..., 0] - returns[rows]
                entropy = Categorical(logits=logits).entropy().mean()
                loss = -surrogate.mean() + 0.5 * mistake.pow(2).mean() - 0.01 * entropy
                if args.fault != "keeps":
                    adam.zero_grad()
                loss.backward()
                nn.utils.clip_grad_norm_(policy.parameters(), 0.5)
                adam.step()
        if rollout % 6 == 0:
            print(f"rollout {rollout} score {score.mean():.3f} kl {drift.sum(1).mean():.3f} loss {loss.item():.4f}")


if __name__ == "__main__":
    main(Args(fault=sys.argv[1] if len(sys.argv) > 1 else ""))
