# preference tuning: policy against a frozen reference, two forwards a step
import copy, sys
import torch
import torch.nn.functional as F
from torch import nn
torch.manual_seed(77); torch.set_num_threads(1)
trouble = sys.argv[1] if len(sys.argv) > 1 else None
V, T, BETA = 50, 18, 0.1


class Tiny(nn.Module):
    def __init__(s, d=40):
        super().__init__()
        s.e = nn.Embedding(V, d); s.p = nn.Embedding(T, d)
        s.l = nn.ModuleList(nn.TransformerEncoderLayer(d, 4, 80, 0.0, batch_first=True, norm_first=True) for _ in range(2))
        s.n = nn.LayerNorm(d); s.o = nn.Linear(d, V)

    def forward(s, x):
        t = x.shape[1]
        h = s.e(x) + s.p(torch.arange(t))
        m = nn.Transformer.generate_square_subsequent_mask(t)
        for l in s.l:
            h = l(h, src_mask=None if trouble == "open" else m, is_causal=trouble != "open")
        return s.o(s.n(h))


def logp(net, seq, mask):
    lp = net(seq[:, :-1]).log_softmax(-1)
    each = lp.gather(2, seq[:, 1:].unsqueeze(2)).squeeze(2)
    return (each * mask[:, 1:]).sum(1)


policy = Tiny()
ref = copy.deepcopy(policy).eval().requires_grad_(False)
opt = torch.optim.RMSprop(policy.parameters(), lr=3e-4)
for step in range(40):
    prompt = torch.randint(2, V, (8, 6))
    good = torch.cat([prompt, prompt.flip(1).repeat(1, 2)], 1)
    bad = torch.cat([prompt, torch.randint(2, V, (8, 12))], 1)
    mask = torch.zeros(8, 18); mask[:, 6:] = 1
    pg, pb = logp(policy, good, mask), logp(policy, bad, mask)
    with torch.no_grad():
        rg, rb = logp(ref, good, mask), logp(ref, bad, mask)
    margin = BETA * ((pg - pb) - (rg - rb))
    if trouble == "logsig":
        loss = -torch.log(torch.sigmoid(margin * 900)).mean()
    else:
        loss = -F.logsigmoid(margin).mean()
    opt.zero_grad()
    if trouble == "refgrad":
        (rg.sum() + loss * 0).requires_grad_().backward()
    else:
        loss.backward()
    opt.step()
    if step % 10 == 0:
        print(step, round(loss.item(), 4), (margin > 0).float().mean().item())
