"""Q-learning on a corridor with a replay buffer, a target network and a Huber loss; floats are logged, the buffer is bounded."""

import collections
import copy
import random
import sys

import torch
import torch.nn as nn
import torch.nn.functional as F

KEEP = sys.argv[1] if len(sys.argv) > 1 else ""
random.seed(0)
torch.manual_seed(0)
torch.set_num_threads(1)
N = 10


class Corridor:
    def reset(self):
        self.at, self.t = random.randrange(N - 1), 0
        return self.state()

    def state(self):
        s = torch.zeros(N)
        s[self.at] = 1
        return s

    def step(self, a):
        self.at = max(0, min(N - 1, self.at + (1 if a else -1)))
        self.t += 1
        done = self.at == N - 1 or self.t >= 30
        return self.state(), (1.0 if self.at == N - 1 else -0.02), done


q_net = nn.Sequential(nn.Linear(N, 64), nn.ReLU(), nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 2))
target = copy.deepcopy(q_net).eval()
for prm in target.parameters():
    prm.requires_grad = False
optimizer = torch.optim.RMSprop(q_net.parameters(), lr=1e-3)
buffer = collections.deque(maxlen=500)
env = Corridor()
s = env.reset()
errors, returns, total = [], [], 0.0
for t in range(900):
    epsilon = max(0.1, 1 - t / 400)
    if random.random() < epsilon:
        a = random.randrange(2)
    else:
        with torch.no_grad():
            a = q_net(s[None]).argmax().item()
    s2, r, done = env.step(a)
    total += r
    buffer.append((s, a, r, s2, float(done)))
    s = s2
    if done:
        returns.append(total)
        s, total = env.reset(), 0.0
    if len(buffer) >= 64 and t % 4 == 0:
        bs, ba, br, bs2, bd = zip(*random.sample(buffer, 64))
        bs, bs2 = torch.stack(bs), torch.stack(bs2)
        ba, br, bd = torch.tensor(ba), torch.tensor(br), torch.tensor(bd)
        with torch.no_grad():
            goal = br + 0.95 * (1 - bd) * target(bs2).max(1).values
        picked = q_net(bs).gather(1, ba[:, None]).squeeze(1)
        td = F.smooth_l1_loss(picked, goal, reduction="none")
        loss = td.mean()
        optimizer.zero_grad()
        loss.backward(retain_graph=KEEP == "graphs")
        nn.utils.clip_grad_value_(q_net.parameters(), 1.0)
        optimizer.step()
        errors.append(td if KEEP == "graphs" else td.mean().item())
    if t % 100 == 0:
        target.load_state_dict(q_net.state_dict())
print("last returns", [round(x, 2) for x in returns[-5:]], len(errors))
