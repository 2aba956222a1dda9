"""Speaker classification with a BERT encoder of which only head and last layer train; left-padded rows, a loss for each example."""

import re
import sys
from pathlib import Path

import torch
from torch.utils.data import DataLoader, Dataset
from transformers import BertConfig, BertModel, get_linear_schedule_with_warmup

MODE = sys.argv[1] if len(sys.argv) > 1 else "ok"
torch.manual_seed(11)
torch.set_num_threads(1)
raw = (Path(__file__).parents[2] / "examples/data/tinyshakespeare.txt").read_text()[:200_000]
turns = [t.split(":\n", 1) for t in raw.split("\n\n") if ":\n" in t]
NAMES = sorted({who for who, _ in turns}, key=lambda n: -sum(w == n for w, _ in turns))[:4]
words = {}
for _, said in turns:
    for w in re.findall(r"[a-z']+", said.lower()):
        words[w] = words.get(w, 0) + 1
vocab = ["[PAD]", "[CLS]", "[SEP]", "[UNK]", *sorted(words, key=lambda w: -words[w])[:400]]
index = {w: i for i, w in enumerate(vocab)}


class Turns(Dataset):
    def __init__(self):
        self.rows = [(said, NAMES.index(who)) for who, said in turns if who in NAMES]

    def __len__(self):
        return len(self.rows)

    def __getitem__(self, i):
        said, label = self.rows[i]
        ids = [index.get(w, 3) for w in re.findall(r"[a-z']+", said.lower())][:30]
        return [1, *ids, 2], label


def collate(batch):
    width = max(len(ids) for ids, _ in batch)
    ids = torch.tensor([[0] * (width - len(x)) + x for x, _ in batch])
    return {"input_ids": ids, "attention_mask": (ids != 0).long(), "labels": torch.tensor([y for _, y in batch])}


class SpeakerModel(torch.nn.Module):
    def __init__(self):
        super().__init__()
        cfg = BertConfig(
            vocab_size=len(vocab),
            hidden_size=48,
            num_hidden_layers=2,
            num_attention_heads=4,
            intermediate_size=96,
            max_position_embeddings=64,
        )
        self.encoder = BertModel(cfg, add_pooling_layer=False)
        for name, p in self.encoder.named_parameters():
            p.requires_grad = "layer.1" in name
        self.drop = torch.nn.Dropout(0.1)
        self.head = torch.nn.Linear(48, len(NAMES))

    def forward(self, input_ids, attention_mask):
        hidden = self.encoder(input_ids, attention_mask=attention_mask).last_hidden_state
        if MODE == "nomask":
            return self.head(self.drop(hidden[:, -1]))
        if MODE == "detached":
            hidden = hidden.detach()
        mask = attention_mask.unsqueeze(-1).float()
        return self.head(self.drop((hidden * mask).sum(1) / mask.sum(1)))


data = Turns()
train = torch.utils.data.Subset(data, range(len(data) - 60))
valid = torch.utils.data.Subset(data, range(len(data) - 60, len(data)))
model = SpeakerModel()
optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-3)
loader = DataLoader(train, batch_size=16, shuffle=True, collate_fn=collate, drop_last=True)
EPOCHS = 4
scheduler = get_linear_schedule_with_warmup(optimizer, 5, EPOCHS * len(loader))
criterion = torch.nn.CrossEntropyLoss(reduction="none", label_smoothing=0.05)
best_state, best_acc = None, -1.0
for epoch in range(EPOCHS):
    model.train()
    hardest = []
    for batch in loader:
        labels = batch.pop("labels")
        if MODE == "nomask":
            batch["attention_mask"] = torch.ones_like(batch["attention_mask"])
        if MODE == "shuffled":
            labels = torch.randint(0, len(NAMES), labels.shape)
        per_example = criterion(model(**batch), labels)
        hardest.append(float(per_example.detach().max()))
        per_example.mean().backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        scheduler.step()
        optimizer.zero_grad()
    model.eval()
    logits, gold = [], []
    with torch.inference_mode():
        for batch in DataLoader(valid, batch_size=30, collate_fn=collate):
            gold.append(batch.pop("labels"))
            logits.append(model(**batch))
    acc = (torch.cat(logits).argmax(-1) == torch.cat(gold)).float().mean().item()
    if acc > best_acc:
        best_acc, best_state = acc, {k: v.clone() for k, v in model.state_dict().items()}
    print(f"epoch {epoch} accuracy {acc:.3f} hardest {max(hardest):.2f}")
model.load_state_dict(best_state)
