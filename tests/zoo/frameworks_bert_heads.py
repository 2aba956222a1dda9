"""Sentence and token classifiers on top of BERT: full fine-tuning, frozen encoder, own heads."""
import argparse, random
import torch
from torch import nn
from torch.nn.utils.rnn import pad_sequence
from transformers import BertConfig, BertForSequenceClassification, BertForTokenClassification, BertModel

torch.set_num_threads(1)
parser = argparse.ArgumentParser()
parser.add_argument("--task", choices=["sentence", "tokens", "own", "regression", "multilabel"], default="sentence")
parser.add_argument("--freeze", choices=["no", "flag", "optim", "nograd"], default="no")
parser.add_argument("--problem", default="")
a = parser.parse_args()
torch.manual_seed(1)
random.seed(1)
cfg = BertConfig(
    vocab_size=60,
    hidden_size=32,
    num_hidden_layers=2,
    num_attention_heads=2,
    intermediate_size=64,
    num_labels=3,
    max_position_embeddings=32,
    problem_type={"regression": "regression", "multilabel": "multi_label_classification"}.get(a.task),
)
if a.task == "regression":
    cfg.num_labels = 1


class OwnHead(nn.Module):
    """Mean over the real tokens of the encoder's last layer."""

    def __init__(self):
        super().__init__()
        self.encoder = BertModel(cfg)
        self.drop = nn.Dropout(0.1)
        self.out = nn.Linear(cfg.hidden_size, 3)

    def forward(self, input_ids, attention_mask, labels):
        hidden = self.encoder(input_ids, attention_mask=attention_mask)[0]
        if a.freeze == "nograd" or a.problem == "detach":
            hidden = hidden.detach()
        if a.problem == "meanall":
            pooled = hidden.mean(1)
        elif a.problem == "meanbatch":
            pooled = (hidden * attention_mask[..., None]).mean(0, keepdim=True).sum(1).expand(len(hidden), -1)
        else:
            pooled = (hidden * attention_mask[..., None]).sum(1) / attention_mask.sum(1, keepdim=True)
        logits = self.out(self.drop(pooled))
        return nn.functional.cross_entropy(logits, labels), logits


model = {
    "sentence": BertForSequenceClassification,
    "tokens": BertForTokenClassification,
    "own": lambda c: OwnHead(),
    "regression": BertForSequenceClassification,
    "multilabel": BertForSequenceClassification,
}[a.task](cfg)
if a.freeze in ("flag", "nograd"):
    backbone = model.encoder if a.task == "own" else model.bert
    for p in backbone.parameters():
        p.requires_grad_(False)
head = [p for n, p in model.named_parameters() if n.startswith(("classifier", "out"))]
todo = head if a.freeze == "optim" or a.problem == "headonly" else [p for p in model.parameters() if p.requires_grad]
opt = torch.optim.AdamW(todo, lr=50.0 if a.problem == "lr" else 1e-3)


def make(n):
    xs, ys = [], []
    for _ in range(n):
        kind = random.randrange(3)
        x = torch.tensor(
            [1]
            + [
                random.randrange(4 + 18 * kind, 22 + 18 * kind) if random.random() < 0.6 else random.randrange(4, 58)
                for _ in range(random.randint(5, 16))
            ]
        )
        xs.append(x)
        ys.append(kind if a.task != "tokens" else ((x - 4).clamp(0) // 18).clamp(max=2))
    ids = pad_sequence(xs, batch_first=True)
    mask = (ids > 0).long()
    if a.task == "tokens":
        labels = pad_sequence(ys, batch_first=True, padding_value=0 if a.problem == "padlabel" else -100)
    elif a.task == "regression":
        labels = torch.tensor(ys).float()
    elif a.task == "multilabel":
        labels = nn.functional.one_hot(torch.tensor(ys), 3).float()
    else:
        labels = torch.tensor(ys)
    return ids, mask, labels


right = total = 0
for epoch in range(2):
    model.train()
    for it in range(20):
        ids, mask, labels = make(16)
        if a.problem == "unmasked":
            mask = torch.ones_like(mask)
        if a.problem == "toolong" and it == 15:
            ids = ids.repeat(1, 4)[:, :40]
            mask, labels = (ids > 0).long(), labels if a.task != "tokens" else ids % 3
        opt.zero_grad()
        out = model(ids, attention_mask=mask, labels=labels)
        loss = out[0]
        if a.problem == "nobackward" and epoch == 0:
            loss.detach_()
        else:
            loss.backward()
        opt.step()
    if a.problem != "trainval":
        model.eval()
    with torch.no_grad():
        ids, mask, labels = make(64)
        out = model(ids, attention_mask=mask, labels=labels)
        if a.task in ("sentence", "own"):
            right, total = (out[1].argmax(-1) == labels).sum().item(), len(labels)
    print(epoch, round(loss.item(), 3), round(out[0].item(), 3), right, total)
