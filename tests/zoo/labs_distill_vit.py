"""A small vision transformer learns planted shapes from labels and from a wider convolutional teacher."""

import argparse

import torch
import torch.nn.functional as F
from torch import nn

p = argparse.ArgumentParser()
p.add_argument("--fault", default="none")
p.add_argument("--style", default="prenorm", choices=["prenorm", "rezero"])
p.add_argument("--task", default="distil", choices=["distil", "detect"])
p.add_argument("--depth", type=int, default=4)
args = p.parse_args()
torch.manual_seed(11)
torch.set_num_threads(1)
CLASSES, PX, PATCH, DIM = 6, 16, 4, 48


def pictures(n):
    y = torch.randint(CLASSES, (n,))
    x = torch.randn(n, 1, PX, PX) * 0.4
    for i, k in enumerate(y.tolist()):
        r, c = torch.randint(8, (2,)).tolist()
        if k % 3 == 0:
            x[i, 0, r : r + 2 + k, c] += 2
        elif k % 3 == 1:
            x[i, 0, r, c : c + 2 + k] += 2
        else:
            x[i, 0, r : r + k, c : c + k] += 1.5
    return x, y


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        bare = args.style == "rezero" or args.fault == "nonorm"
        self.n1, self.n2 = (nn.Identity(), nn.Identity()) if bare else (nn.LayerNorm(DIM), nn.LayerNorm(DIM))
        self.attn = nn.MultiheadAttention(DIM, 4, batch_first=True)
        self.mlp = nn.Sequential(nn.Linear(DIM, 4 * DIM), nn.ReLU(), nn.Linear(4 * DIM, DIM))
        self.alpha = nn.Parameter(torch.zeros(())) if args.style == "rezero" else 1.0

    def forward(self, x):
        h = self.n1(x)
        x = x + self.alpha * self.attn(h, h, h, need_weights=False)[0]
        return x + self.alpha * self.mlp(self.n2(x))


class ViT(nn.Module):
    def __init__(self):
        super().__init__()
        self.patch = nn.Conv2d(1, DIM, PATCH, PATCH)
        self.cls = nn.Parameter(torch.zeros(1, 1, DIM))
        self.pos = nn.Parameter(torch.randn(1, (PX // PATCH) ** 2 + 1, DIM) * 0.02)
        self.blocks = nn.Sequential(*[Block() for _ in range(args.depth)])
        self.norm = nn.Identity() if args.fault == "nonorm" else nn.LayerNorm(DIM)
        self.head = nn.Linear(DIM, CLASSES)
        if args.fault == "nonorm":
            for m in self.modules():
                if isinstance(m, nn.Linear):
                    nn.init.kaiming_normal_(m.weight)
        if args.fault == "prior":
            for m in self.modules():
                if isinstance(m, nn.Linear) and m.bias is not None:
                    nn.init.constant_(m.bias, -4.6)
        elif args.task == "detect":
            nn.init.constant_(self.head.bias, -1.6)

    def forward(self, x):
        b = x.shape[0]
        x = self.patch(x)
        if args.fault == "patchbatch":
            x = x.permute(2, 3, 0, 1).reshape(b, -1, DIM)
        else:
            x = x.flatten(2).transpose(1, 2)
        x = torch.cat([self.cls.expand(b, -1, -1), x], 1) + self.pos
        return self.head(self.norm(self.blocks(x))[:, 0])


class Teacher(nn.Sequential):
    def __init__(self):
        super().__init__(
            nn.Conv2d(1, 24, 5, padding=2), nn.BatchNorm2d(24), nn.ReLU(), nn.MaxPool2d(2),
            nn.Conv2d(24, 48, 3, padding=1), nn.BatchNorm2d(48), nn.ReLU(), nn.AdaptiveMaxPool2d(2),
            nn.Flatten(), nn.Linear(192, CLASSES),
        )  # fmt: skip


def soft_loss(student, teacher, temperature):
    if args.fault == "klzero":
        t = F.softmax(teacher / 0.01, -1)  # sharpened
        return (t * (t.log() - F.log_softmax(student, -1))).sum(-1).mean()
    t = F.log_softmax(teacher / temperature, -1)
    return F.kl_div(F.log_softmax(student / temperature, -1), t, reduction="batchmean", log_target=True) * temperature**2


def focal(logits, y):
    goal = F.one_hot(y, CLASSES).float()
    bce = F.binary_cross_entropy_with_logits(logits, goal, reduction="none")
    return ((1 - torch.exp(-bce)) ** 2 * bce).sum(1).mean()


images, labels = pictures(1500)
held, held_labels = pictures(200)
teacher = Teacher()
opt = torch.optim.Adam(teacher.parameters(), 2e-3)
for _ in range(60):
    rows = torch.randint(1500, (48,))
    opt.zero_grad()
    F.cross_entropy(teacher(images[rows]), labels[rows]).backward()
    opt.step()
teacher.eval().requires_grad_(False)
print("teacher", (teacher(held).argmax(1) == held_labels).float().mean().item())

student = ViT()
opt = torch.optim.AdamW(student.parameters(), 1e-3, weight_decay=0.05)
for epoch in range(3):
    order = torch.randperm(1500)
    for rows in order.split(48):
        logits = student(images[rows])
        if args.task == "detect":
            loss = focal(logits, labels[rows])
        else:
            with torch.no_grad():
                wise = teacher(images[rows])
            loss = 0.5 * F.cross_entropy(logits, labels[rows]) + 0.5 * soft_loss(logits, wise, 3.0)
        opt.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(student.parameters(), 1.0)
        opt.step()
    student.eval()
    with torch.no_grad():
        print(epoch, loss.item(), (student(held).argmax(1) == held_labels).float().mean().item())
    student.train()
