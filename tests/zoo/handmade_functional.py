import sys
import torch
from torch import nn
from torch.func import functional_call, grad, grad_and_value, vmap
torch.manual_seed(1)
torch.set_num_threads(1)
style = sys.argv[1] if len(sys.argv) > 1 else "percall"
net = nn.Sequential(nn.Linear(5, 32), nn.GELU(), nn.LayerNorm(32), nn.Linear(32, 3))
w = {k: v.detach().clone() for k, v in net.named_parameters()}
teacher = torch.randn(5, 3)


def loss_of(params, x, y):
    out = functional_call(net, params, (x,))
    return nn.functional.cross_entropy(out, y)


for step in range(80):
    x = torch.randn(64, 5)
    y = (x @ teacher).argmax(1)
    if style == "persample":
        per = vmap(grad(loss_of), in_dims=(None, 0, 0))(w, x[:, None], y[:, None])
        norms = torch.stack([g.flatten(1).norm(dim=1) for g in per.values()]).norm(dim=0)
        factor = (1.0 / (norms + 1e-6)).clamp(max=1.0)
        g = {k: (v * factor.view(-1, *[1] * (v.dim() - 1))).mean(0) for k, v in per.items()}
        value = loss_of(w, x, y)
    elif style == "leaf":
        live = {k: v.requires_grad_() for k, v in w.items()}
        value = loss_of(live, x, y)
        g = dict(zip(live, torch.autograd.grad(value, list(live.values()))))
    else:
        g, value = grad_and_value(loss_of)(w, x, y)
    w = {k: (v - 0.3 * g[k]).detach() for k, v in w.items()}
    if step % 20 == 0:
        print(step, value.item())
