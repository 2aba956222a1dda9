"""Small GPT-2 / Llama under transformers' Trainer, Lightning, and an evaluation of one's own; --what picks the habit."""
import argparse
import random

import torch
from torch import nn
from torch.utils.data import DataLoader
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM, Trainer, TrainerCallback, TrainingArguments, set_seed

ap = argparse.ArgumentParser()
ap.add_argument("--what", default="trainer")
what = ap.parse_args().what
set_seed(3)
rng = random.Random(0)


def row():
    start, gap = rng.randint(0, 30), rng.randint(1, 3)
    return torch.tensor([(start + gap * i) % 50 + 2 for i in range(40)])


rows = [row() for _ in range(400)]
train, held = [{"input_ids": r, "labels": r.clone()} for r in rows[:320]], [{"input_ids": r, "labels": r.clone()} for r in rows[320:]]
gpt2 = lambda vocab=64: GPT2LMHeadModel(GPT2Config(vocab_size=vocab, n_positions=64, n_embd=64, n_layer=2, n_head=4, bos_token_id=0, eos_token_id=1))
llama = lambda vocab=64: LlamaForCausalLM(LlamaConfig(vocab_size=vocab, hidden_size=64, intermediate_size=160, num_hidden_layers=2, num_attention_heads=4, max_position_embeddings=64))


class Watching(Trainer):
    """remembers losses for a plot"""

    remembered = []

    def compute_loss(self, model, inputs, return_outputs=False, **kw):
        loss, outputs = super().compute_loss(model, inputs, return_outputs=True, **kw)
        self.remembered.append(loss if what == "trainer-keeps" else loss.detach())
        return (loss, outputs) if return_outputs else loss


def with_trainer(model, cls=Trainer, evaluate=False, **kw):
    args = TrainingArguments(output_dir="out", max_steps=40, per_device_train_batch_size=8, learning_rate=1e-3, warmup_steps=5, logging_steps=10, report_to=[], save_strategy="no", disable_tqdm=True, use_cpu=True, eval_strategy="steps" if evaluate else "no", eval_steps=20)
    cls(model=model, args=args, train_dataset=train, eval_dataset=held, **kw).train()


def own_loop(model, evaluate):
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    loader = DataLoader(train, batch_size=8, shuffle=True)
    model.train()
    for step, batch in enumerate(loader):
        for g in optimizer.param_groups:
            g["lr"] = 1e-3 * min(1, (step + 1) / 6)
        loss = model(**batch).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        if step % 15 == 14:
            model.eval()
            print(step, loss.item(), evaluate(model))
            model.train()


def graphs(model):
    total = 0
    for b in DataLoader(held, batch_size=8):
        total += model(**b).loss
    return (total / 10).item()


def collected(model):
    outs = [model(**b) for b in DataLoader(held, batch_size=8)]
    return torch.stack([o.loss for o in outs]).mean().item()


@torch.no_grad()
def light(model):
    logits = torch.cat([model(**b).logits for b in DataLoader(held, batch_size=8)])
    return logits.argmax(-1).float().mean().item()


def forgot(model):
    return sum(model(**b).loss.item() for b in DataLoader(held, batch_size=8)) / 10


if what in ("trainer-keeps", "trainer-numbers"):
    with_trainer(llama(), Watching)
elif what == "trainer":
    with_trainer(gpt2(), evaluate=True, compute_metrics=lambda p: {"acc": float((p.predictions.argmax(-1)[:, :-1] == p.label_ids[:, 1:]).mean())})
elif what == "vocabulary":
    with_trainer(llama(32000))
elif what == "vocabulary-gpt2":
    own_loop(gpt2(50257), light)
elif what.startswith("lightning"):
    import lightning as L

    class Lit(L.LightningModule):
        def __init__(self):
            super().__init__()
            self.net, self.outputs, self.seen = gpt2(), [], []

        def training_step(self, batch, i):
            out = self.net(**batch)
            self.outputs.append({"loss": out.loss if what == "lightning-keeps" else out.loss.detach(), "n": 8})
            return out.loss

        def validation_step(self, batch, i):
            self.seen.append(self.net(**batch).logits)

        def on_validation_epoch_end(self):
            self.seen.clear()

        def configure_optimizers(self):
            return torch.optim.AdamW(self.parameters(), lr=1e-3)

    L.Trainer(max_steps=40, accelerator="cpu", logger=False, enable_checkpointing=False, enable_progress_bar=False, enable_model_summary=False).fit(Lit(), DataLoader(train, batch_size=8, shuffle=True), DataLoader(held, batch_size=8))
else:
    own_loop(gpt2(), {"eval-graphs": graphs, "eval-collected": collected, "eval-light": light, "eval-forgot": forgot}[what])
