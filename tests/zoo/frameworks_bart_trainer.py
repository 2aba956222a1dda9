"""Seq2SeqTrainer on a toy copy-with-noise task."""

import os, sys, tempfile
import numpy as np, torch
from transformers import BartConfig, BartForConditionalGeneration, Seq2SeqTrainer, Seq2SeqTrainingArguments
from transformers import MarianConfig, MarianMTModel

torch.set_num_threads(1)
bug = os.environ.get("BUG", "") or (sys.argv[1] if len(sys.argv) > 1 else "")
rng = np.random.default_rng(8)
PAD, BOS, EOS = 1, 0, 2
cfg = dict(
    vocab_size=50,
    d_model=32,
    encoder_layers=2,
    decoder_layers=2,
    encoder_attention_heads=4,
    decoder_attention_heads=4,
    encoder_ffn_dim=64,
    decoder_ffn_dim=64,
    max_position_embeddings=40,
    pad_token_id=PAD,
    bos_token_id=BOS,
    eos_token_id=EOS,
    decoder_start_token_id=EOS,
    forced_eos_token_id=EOS,
)


class Pairs(torch.utils.data.Dataset):
    def __init__(self, n):
        self.rows = [rng.integers(3, 50, rng.integers(4, 14)) for _ in range(n)]

    def __len__(self):
        return len(self.rows)

    def __getitem__(self, k):
        r = self.rows[k]
        return {"input_ids": [BOS, *r.tolist(), EOS], "labels": [BOS, *(((r - 3) * 3) % 47 + 3).tolist(), EOS]}


def collate(feats):
    def block(key, fill):
        w = max(len(f[key]) for f in feats)
        return torch.tensor([f[key] + [fill] * (w - len(f[key])) for f in feats])

    x = block("input_ids", PAD)
    y = block("labels", PAD if bug == "pad_loss" else -100)
    out = {"input_ids": x, "labels": y}
    if bug != "no_mask":
        out["attention_mask"] = (x != PAD).long()
    if bug == "targets_as_inputs":
        out["decoder_input_ids"] = y.masked_fill(y == -100, PAD)
    return out


def metrics(p):
    preds, labels = p
    preds = np.where(preds < 0, PAD, preds)
    return {"len": float((preds != PAD).sum(1).mean()), "n": float(len(labels))}


torch.manual_seed(0)
model = MarianMTModel(MarianConfig(**cfg)) if bug == "marian" else BartForConditionalGeneration(BartConfig(**cfg))
if bug == "frozen_encoder":
    for p in model.get_encoder().layers.parameters():
        p.requires_grad = False
with tempfile.TemporaryDirectory() as d:
    t = Seq2SeqTrainer(
        model=model,
        args=Seq2SeqTrainingArguments(
            d,
            max_steps=40,
            per_device_train_batch_size=16,
            learning_rate=8.0 if bug == "lr" else 1e-3,
            predict_with_generate=True,
            generation_max_length=12,
            eval_strategy="steps",
            eval_steps=20,
            report_to=[],
            use_cpu=True,
            save_strategy="no",
            logging_steps=10,
            disable_tqdm=True,
            label_smoothing_factor=0.1 if bug == "smooth" else 0.0,
            warmup_steps=4 if bug != "lr" else 0,
            gradient_accumulation_steps=2 if bug == "accumulate" else 1,
        ),
        train_dataset=Pairs(800),
        eval_dataset=Pairs(24),
        data_collator=collate,
        compute_metrics=metrics,
    )
    t.train()
