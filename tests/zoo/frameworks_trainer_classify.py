"""Trainer on sequence and token classification with dynamic padding, class weights, early stopping and own callbacks."""

import argparse
import random
import tempfile

import numpy as np, torch, transformers as tf
from transformers import Trainer, TrainerCallback, TrainingArguments

torch.set_num_threads(1)
cli = argparse.ArgumentParser()
cli.add_argument("--model", default="distilbert")
cli.add_argument("--wrong", default="")
cli.add_argument("--optim", default="adamw_torch")
cli.add_argument("--steps", type=int, default=40)
opt = cli.parse_args()
random.seed(2), torch.manual_seed(2)

def build():
    if opt.model == "gpt2":
        return tf.GPT2ForSequenceClassification(
            tf.GPT2Config(vocab_size=50, n_positions=32, n_embd=32, n_layer=2, n_head=2, num_labels=2, pad_token_id=0)
        )
    if opt.model == "electra":
        return tf.ElectraForTokenClassification(
            tf.ElectraConfig(
                vocab_size=50,
                embedding_size=16,
                hidden_size=32,
                num_hidden_layers=2,
                num_attention_heads=2,
                intermediate_size=64,
                num_labels=2,
            )
        )
    return tf.DistilBertForSequenceClassification(tf.DistilBertConfig(vocab_size=50, dim=32, n_layers=2, n_heads=2, hidden_dim=64, num_labels=2))


class Reviews(torch.utils.data.Dataset):
    def __init__(self, n):
        self.rows = []
        for _ in range(n):
            y = int(random.random() < 0.3)
            self.rows.append(([random.choice(range(1, 30) if y else range(15, 50)) for _ in range(random.randint(4, 20))], y))

    def __len__(self):
        return len(self.rows)

    def __getitem__(self, i):
        ids, y = self.rows[i]
        return {"input_ids": ids, "labels": y if opt.model != "electra" else [int(t < 20) for t in ids]}


def collate(rows):
    w = max(len(r["input_ids"]) for r in rows)
    ids = torch.tensor([r["input_ids"] + [0] * (w - len(r["input_ids"])) for r in rows])
    if opt.model == "electra":
        fill = 1 if opt.wrong == "padlabels" else -100
        y = torch.tensor([r["labels"] + [fill] * (w - len(r["labels"])) for r in rows])
    else:
        y = torch.tensor([r["labels"] for r in rows])
    batch = {"input_ids": ids, "labels": y}
    if opt.wrong != "nomask":
        batch["attention_mask"] = (ids > 0).long()
    return batch


class Weighted(Trainer):
    def compute_loss(self, model, inputs, return_outputs=False, **kwargs):
        y = inputs.pop("labels")
        out = model(**inputs)
        weight = torch.tensor([1.0, 2.0])
        logits = out.logits.view(-1, 2)
        if opt.wrong == "argmax":
            logits = torch.nn.functional.one_hot(logits.argmax(-1), 2).float().requires_grad_()
        if opt.wrong == "logprob":
            p = torch.sigmoid(2000 * logits[:, 1]) if logits.shape[0] == y.numel() else None
            loss = -(y.view(-1).float() * p.log() + (1 - y.view(-1).float()) * (1 - p).log()).mean()
        else:
            loss = torch.nn.functional.cross_entropy(logits, y.view(-1), weight=weight)
        return (loss, out) if return_outputs else loss


class Switch(TrainerCallback):
    def on_step_begin(self, args, state, control, model=None, **kwargs):
        if opt.wrong == "frozenmode" and state.global_step == 0:
            model.train = lambda mode=True: model
            torch.nn.Module.train(model, False)


with tempfile.TemporaryDirectory() as out:
    args = TrainingArguments(
        out,
        max_steps=opt.steps,
        per_device_train_batch_size=16,
        learning_rate=3.0 if opt.wrong == "lr" else 1e-3,
        report_to=[],
        eval_strategy="steps",
        eval_steps=10,
        save_strategy="steps",
        save_steps=10,
        load_best_model_at_end=True,
        use_cpu=True,
        logging_steps=5,
        disable_tqdm=True,
        optim=opt.optim,
        metric_for_best_model="accuracy",
        weight_decay=0.1,
    )
    trainer = Weighted(
        build(),
        args,
        train_dataset=Reviews(400),
        eval_dataset=Reviews(64),
        data_collator=collate,
        compute_metrics=lambda p: {"accuracy": float((np.argmax(p.predictions, -1) == p.label_ids).mean())},
        callbacks=[Switch(), tf.EarlyStoppingCallback(10)],
    )
    trainer.train()
