"""Text classification tutorial: encoder, early stopping, a binary head."""
import argparse, copy, random
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

P = argparse.ArgumentParser()
P.add_argument("--head", default="bce")  # bce: sigmoid + BCELoss; logits: BCEWithLogits; both: sigmoid, then BCEWithLogits; softmaxce; ce
P.add_argument("--train", type=int, default=800)
P.add_argument("--epochs", type=int, default=5)
P.add_argument("--noise", type=float, default=0.0)
P.add_argument("--drop", type=float, default=0.1)
P.add_argument("--lr", type=float, default=2e-3)
P.add_argument("--patience", type=int, default=0)
P.add_argument("--task", default="words")
P.add_argument("--width", type=int, default=32)
P.add_argument("--sched", default="")
A = P.parse_args()
torch.manual_seed(11)
random.seed(11)
V, T = 120, 20


def make(count):
    X, Y = torch.randint(20, V, (count, T)), torch.zeros(count, dtype=torch.long)
    for i in range(count):
        y = random.random() < 0.5
        for j in random.sample(range(T), 4):
            X[i, j] = random.randint(1, 9) + (9 if y else 0)
        Y[i] = int(y) if random.random() >= A.noise else random.randint(0, 1)
    if A.task == "parity":
        X = torch.randint(0, 2, (count, T))
        Y = X.sum(1) % 2
    return X, Y


train_set, val_set = TensorDataset(*make(A.train)), TensorDataset(*make(300))


class Encoder(nn.Module):
    def __init__(self):
        super().__init__()
        d = A.width
        self.emb, self.pos = nn.Embedding(V, d), nn.Parameter(torch.zeros(T, d))
        self.enc = nn.TransformerEncoder(nn.TransformerEncoderLayer(d, 2, 2 * d, A.drop, batch_first=True), 2, enable_nested_tensor=False)
        self.fc = nn.Linear(d, 2 if A.head in ("softmaxce", "ce") else 1)

    def forward(self, x):
        z = self.fc(self.enc(self.emb(x) + self.pos).mean(1))
        if A.head in ("bce", "both"):
            return torch.sigmoid(z).squeeze(1)
        if A.head == "softmaxce":
            return z.softmax(-1)
        return z.squeeze(1) if z.shape[1] == 1 else z


model = Encoder()
criterion = {"bce": nn.BCELoss(), "logits": nn.BCEWithLogitsLoss(), "both": nn.BCEWithLogitsLoss()}.get(A.head, nn.CrossEntropyLoss())
opt = torch.optim.AdamW(model.parameters(), lr=A.lr)
steps = A.epochs * ((A.train + 31) // 32)
sched = {"onecycle": lambda: torch.optim.lr_scheduler.OneCycleLR(opt, A.lr, total_steps=steps),
         "restarts": lambda: torch.optim.lr_scheduler.CosineAnnealingWarmRestarts(opt, 20),
         "zero": lambda: torch.optim.lr_scheduler.CosineAnnealingLR(opt, steps)}.get(A.sched, lambda: None)()
best, bad, kept = 9e9, 0, None
cast = (lambda y: y) if A.head in ("softmaxce", "ce") else (lambda y: y.float())
for epoch in range(A.epochs):
    model.train()
    total = 0.0
    for x, y in DataLoader(train_set, 32, shuffle=True):
        opt.zero_grad()
        loss = criterion(model(x), cast(y))
        loss.backward()
        opt.step()
        if sched:
            sched.step()
        total += loss.item() * len(x)
    model.eval()
    with torch.no_grad():
        val = sum(criterion(model(x), cast(y)).item() * len(x) for x, y in DataLoader(val_set, 100)) / len(val_set)
    print(f"epoch {epoch}: train {total / A.train:.4f} val {val:.4f}")
    if val < best:
        best, bad, kept = val, 0, copy.deepcopy(model.state_dict())
    else:
        bad += 1
        if A.patience and bad >= A.patience:
            print("early stop")
            break
if A.patience:
    model.load_state_dict(kept)
