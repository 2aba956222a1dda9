"""Two tasks over one recurrent encoder, written with dictionaries of tensors and two optimizers; a soft cap with its own backward."""

import sys

import torch
import torch.nn.functional as F

fault = next((a.split("=")[1] for a in sys.argv[1:] if a.startswith("--fault=")), "none")
STEPS, BATCH, T, V, D = 120, 24, 14, 20, 40
gen = torch.Generator().manual_seed(0)
torch.manual_seed(0)
torch.set_num_threads(1)


class SoftCap(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, cap):
        y = cap * torch.tanh(x / cap)
        ctx.cap = cap
        ctx.save_for_backward(y)
        return y

    @staticmethod
    def backward(ctx, grad):
        (y,) = ctx.saved_tensors
        if fault == "softcap":
            return grad * (1 - torch.tanh(y) ** 2), None
        return grad * (1 - (y / ctx.cap) ** 2), None


def weight(*shape):
    return (torch.randn(*shape, generator=gen) * shape[0] ** -0.5).requires_grad_()


def bias(n):
    return torch.zeros(n, requires_grad=True)


encoder = {
    "emb": weight(V, D),
    **{name: weight(2 * D, D) for name in ("wz", "wr", "wh")},
    **{name: bias(D) for name in ("bz", "br", "bh")},
}
tasks = {
    "count": {"w1": weight(D, D), "b1": bias(D), "w2": weight(D, 1), "b2": bias(1)},
    "last": {"w1": weight(D, D), "b1": bias(D), "w2": weight(D, V), "b2": bias(V)},
}


def encode(p, ids):
    h = torch.zeros(ids.shape[0], D)
    for x in p["emb"][ids].unbind(1):
        both = torch.cat([x, h], 1)
        z, r = torch.sigmoid(both @ p["wz"] + p["bz"]), torch.sigmoid(both @ p["wr"] + p["br"])
        new = torch.tanh(torch.cat([x, r * h], 1) @ p["wh"] + p["bh"])
        h = (1 - z) * h + z * new
    return h


def answer(p, h):
    return SoftCap.apply(F.gelu(h @ p["w1"] + p["b1"]) @ p["w2"] + p["b2"], 15.0)


def batch():
    ids = torch.randint(V, (BATCH, T), generator=gen)
    return ids, (ids < 5).float().mean(1), ids[:, -1]


body = torch.optim.Adam(encoder.values(), 3e-3)
heads = torch.optim.Adam([p for t in tasks.values() for p in t.values()], 3e-3)
if fault == "onehead":
    heads = torch.optim.Adam(tasks["last"].values(), 3e-3)
running = None
for step in range(STEPS):
    ids, share, last = batch()
    h = encode(encoder, ids)
    loss_count = F.smooth_l1_loss(answer(tasks["count"], h).squeeze(1), share)
    loss_last = F.cross_entropy(answer(tasks["last"], h), last)
    loss = 5 * loss_count + loss_last
    heads.zero_grad()
    if fault != "halfzero":
        body.zero_grad()
    loss.backward()
    if fault == "rebind":
        with torch.no_grad():
            for part in (encoder, *tasks.values()):
                for p in part.values():
                    p = p - 0.05 * p.grad
    elif fault == "byhand":
        with torch.no_grad():
            for part in (encoder, *tasks.values()):
                for name, p in part.items():
                    part[name] = (p - 0.05 * p.grad).requires_grad_()
    else:
        if fault != "halfstep" and not (fault == "alternate" and step % 2):
            body.step()
        heads.step()
    running = loss.item() if running is None else 0.9 * running + 0.1 * loss.item()
    if step % 30 == 0:
        print(f"{step} {running:.4f} {loss_count.item():.4f} {loss_last.item():.4f}")
