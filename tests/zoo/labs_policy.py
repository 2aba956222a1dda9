"""Actor and critic on a small grid world with invalid actions masked: advantages normalised, PPO-clipped objective, entropy bonus."""

import argparse
from types import SimpleNamespace

import torch
from torch import nn

SIZE = 5
MOVES = torch.tensor([[0, 1], [1, 0], [0, -1], [-1, 0]])


class Grid:
    """Many walkers on a square; the reward is 1 at the goal."""

    def __init__(self, count, generator):
        self.count, self.generator = count, generator
        self.at = torch.randint(SIZE, (count, 2), generator=generator)

    def observe(self):
        cell = nn.functional.one_hot(self.at, SIZE).flatten(1).float()
        after = self.at[:, None] + MOVES
        return cell, ((after >= 0) & (after < SIZE)).all(-1)

    def act(self, action):
        self.at = self.at + MOVES[action]
        arrived = (self.at == SIZE - 1).all(1)
        fresh = torch.randint(SIZE, (self.count, 2), generator=self.generator)
        self.at = torch.where(arrived[:, None], fresh, self.at)
        return arrived.float()


class Actor(nn.Module):
    def __init__(self, hidden=48):
        super().__init__()
        self.body = nn.Sequential(nn.Linear(2 * SIZE, hidden), nn.Tanh(), nn.Linear(hidden, hidden), nn.Tanh(), nn.Linear(hidden, 4))

    def forward(self, cell, valid):
        return self.body(cell).masked_fill(~valid, float("-inf")).softmax(-1)


class Critic(nn.Module):
    def __init__(self, hidden=48):
        super().__init__()
        self.body = nn.Sequential(nn.Linear(2 * SIZE, hidden), nn.Tanh(), nn.Linear(hidden, 1))

    def forward(self, cell):
        return self.body(cell)


@torch.no_grad()
def collect(grid, actor, steps):
    memory = []
    for _ in range(steps):
        cell, valid = grid.observe()
        probs = actor(cell, valid)
        action = torch.multinomial(probs, 1)[:, 0]
        reward = grid.act(action)
        memory.append((cell, valid, action, probs.gather(1, action[:, None])[:, 0].log(), reward))
    returns, future = [], torch.zeros(grid.count)
    for *_, reward in reversed(memory):
        future = reward + 0.9 * future
        returns.insert(0, future)
    cells, valids, actions, old, _ = (torch.stack(part).flatten(0, 1) for part in zip(*memory))
    return SimpleNamespace(cell=cells, valid=valids, action=actions, old=old, returns=torch.stack(returns).flatten(0, 1))


def losses(args, actor, critic, rollout):
    value = critic(rollout.cell)
    if args.fault != "values":
        value = value.squeeze(-1)
    advantage = rollout.returns - (value.detach() if value.dim() == 1 else value.detach()[:, 0])
    if args.fault == "baseline":  # rewards of the first rollouts are all zero
        advantage = rollout.returns
        advantage = (advantage - advantage.mean()) / advantage.std()
    else:
        advantage = (advantage - advantage.mean()) / (advantage.std() + 1e-8)
    probs = actor(rollout.cell, rollout.valid)
    new = probs.gather(1, rollout.action[:, None])[:, 0].log()
    ratio = (new - rollout.old).exp()
    policy = -torch.min(ratio * advantage, ratio.clamp(0.8, 1.2) * advantage).mean()
    if args.fault == "entropy":
        entropy = -(probs * probs.log()).sum(-1).mean()
    else:
        entropy = -(probs * probs.clamp_min(1e-8).log()).sum(-1).mean()
    return policy, (value - rollout.returns).pow(2).mean(), entropy


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("--fault", default="none")
    parser.add_argument("--updates", type=int, default=30)
    args = parser.parse_args()
    torch.manual_seed(3)
    torch.set_num_threads(1)
    actor, critic = Actor(), Critic()
    parameters = list(actor.parameters())
    if args.fault != "criticlost":
        parameters += list(critic.parameters())
    optimizer = torch.optim.Adam(parameters, lr=3e-3)
    grid = Grid(32, torch.Generator().manual_seed(0))
    if args.fault == "baseline":
        grid.at.zero_()
    for update in range(args.updates):
        rollout = collect(grid, actor, 6 if args.fault == "baseline" else 16)
        for _ in range(3):
            policy, value, entropy = losses(args, actor, critic, rollout)
            loss = policy + 0.5 * value - 0.01 * entropy
            optimizer.zero_grad()
            loss.backward()
            nn.utils.clip_grad_norm_(parameters, 0.5)
            optimizer.step()
        if update % 10 == 0:
            print(update, f"return {rollout.returns.mean():.3f} value loss {value.item():.3f} entropy {entropy.item():.3f}")


if __name__ == "__main__":
    main()
