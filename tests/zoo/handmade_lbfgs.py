"""Full-batch fits with LBFGS and a closure, in float64, then a polishing run with SGD at a large rate."""
import torch, sys
torch.set_default_dtype(torch.float64)
torch.manual_seed(0); torch.set_num_threads(1)
X = torch.linspace(-3, 3, 200)[:, None]
Y = torch.sin(2 * X) + 0.3 * X**2
net = torch.nn.Sequential(torch.nn.Linear(1, 24), torch.nn.Tanh(), torch.nn.Linear(24, 24), torch.nn.Tanh(), torch.nn.Linear(24, 1))
opt = torch.optim.LBFGS(net.parameters(), lr=1, max_iter=5, line_search_fn="strong_wolfe")
loss_fn = torch.nn.MSELoss()


def closure():
    opt.zero_grad()
    l = loss_fn(net(X), Y)
    if "sqrt" in sys.argv:
        l = l + 1e-3 * torch.sqrt((net(X) - net(X).detach()).abs()).mean()
    l.backward()
    return l


for i in range(15):
    l = opt.step(closure)
    print(i, l.item())
sgd = torch.optim.SGD(net.parameters(), lr=0.01, momentum=0.5, nesterov=True)
for i in range(30):
    sgd.zero_grad()
    e = ((net(X) - Y) ** 2).mean()
    e.backward()
    sgd.step()
print("end", e.item())
