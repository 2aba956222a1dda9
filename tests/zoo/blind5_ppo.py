# PPO with a learned baseline (one value per prompt) for an HF GPT-2 policy.
# Reward: how many of the generated digits are larger than the digit before them.
import torch
from torch import nn
from transformers import GPT2Config, GPT2Model

torch.manual_seed(21)
DIGITS, PROMPT, GEN = 10, 3, 5


class ActorCritic(nn.Module):
    def __init__(self):
        super().__init__()
        self.body = GPT2Model(GPT2Config(vocab_size=DIGITS, n_positions=16, n_embd=64, n_layer=2, n_head=4,
                                         resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0,
                                         bos_token_id=0, eos_token_id=0))
        self.actor = nn.Linear(64, DIGITS)
        self.critic = nn.Sequential(nn.Linear(64, 64), nn.Tanh(), nn.Linear(64, 1))

    def forward(self, seq):
        h = self.body(input_ids=seq, use_cache=False).last_hidden_state
        value = self.critic(h[:, PROMPT - 1])
        return self.actor(h), value.squeeze(-1)

    @torch.no_grad()
    def act(self, seq):
        for _ in range(GEN):
            logits, _ = self(seq)
            nxt = torch.distributions.Categorical(logits=logits[:, -1]).sample()
            seq = torch.cat((seq, nxt.unsqueeze(1)), dim=1)
        return seq


def score(seq):
    tail = seq[:, PROMPT - 1:]
    up = (tail[:, 1:] > tail[:, :-1]).float().sum(1)
    return up + 0.5 * (seq[:, :PROMPT].float().mean(1) - 4.5) / 4.5     # prompt bonus: only the critic can explain it


def log_probs(logits, seq):
    dist = torch.distributions.Categorical(logits=logits[:, PROMPT - 1:-1])
    return dist.log_prob(seq[:, PROMPT:]), dist.entropy()


net = ActorCritic()
optimizer = torch.optim.Adam(net.parameters(), lr=1e-3, eps=1e-5)
history = []
for update in range(60):
    prompts = torch.randint(0, DIGITS, (128, PROMPT))
    seq = net.act(prompts)
    returns = score(seq)
    with torch.no_grad():
        logits, v_old = net(seq)
        lp_old, _ = log_probs(logits, seq)
    adv = returns - v_old.reshape(-1)
    adv = ((adv - adv.mean()) / (adv.std() + 1e-8)).unsqueeze(1)
    for mb in torch.randperm(128).split(64):
        logits, value = net(seq[mb])
        lp, ent = log_probs(logits, seq[mb])
        ratio = torch.exp(lp - lp_old[mb])
        pg = -torch.min(ratio * adv[mb], ratio.clamp(0.8, 1.2) * adv[mb]).mean()
        vf = (value - returns[mb]).pow(2).mean()
        loss = pg + 0.5 * vf - 0.005 * ent.mean()
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(net.parameters(), 0.5)
        optimizer.step()
    with torch.no_grad():
        explained = 1 - (returns - v_old.reshape(-1)).var() / returns.var()
    history.append(returns.mean().item())
    if update % 6 == 0 or update == 59:
        print(f"update {update:3d}  return {history[-1]:.3f}  value loss {vf.item():.3f}  "
              f"explained var {explained.item():+.2f}  entropy {ent.mean().item():.2f}")
print("mean return, last 5 updates:", round(sum(history[-5:]) / 5, 3))
