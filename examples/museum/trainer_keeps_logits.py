"""Training fits, evaluation runs out of memory: the logits of the whole evaluation set are kept for a metric that needs their argmax.

A masked language model was trained with the Trainer and a `compute_metrics`. The Trainer collects all predictions first, here rows x
length x vocabulary floats; 1,000 rows of 512 tokens over 30,522 words are more than 14 GB wherever they are kept. The reports led to the
argument `preprocess_logits_for_metrics`, which reduces each batch as it comes. Here a small GPT-2 keeps 360 MiB. Repair: that argument.

Thread: https://github.com/huggingface/transformers/issues/8476
Thread: https://github.com/huggingface/transformers/issues/15466
Condition: evaluation-memory
"""

import sys
import tempfile
from pathlib import Path

import torch
from transformers import GPT2Config, GPT2LMHeadModel, Trainer, TrainingArguments

FIXED = "fixed" in sys.argv[1:]
CONTEXT, VOCABULARY = 64, 8192

text = (Path(__file__).resolve().parent.parent / "data" / "tinyshakespeare.txt").read_text()[:400_000].split()
words = {word: number for number, word in enumerate(sorted(set(text))[: VOCABULARY - 1], 1)}
ids = torch.tensor([words.get(word, 0) for word in text])
rows = [{"input_ids": row, "labels": row} for row in ids[: len(ids) // CONTEXT * CONTEXT].view(-1, CONTEXT)]


def compute_metrics(prediction):
    guesses = prediction.predictions if FIXED else prediction.predictions.argmax(-1)
    return {"accuracy": float((guesses[:, :-1] == prediction.label_ids[:, 1:]).mean())}


torch.manual_seed(0)
config = GPT2Config(vocab_size=VOCABULARY, n_positions=CONTEXT, n_embd=32, n_layer=2, n_head=2, bos_token_id=0, eos_token_id=0)
with tempfile.TemporaryDirectory() as folder:
    arguments = TrainingArguments(
        folder,
        per_device_train_batch_size=4,
        per_device_eval_batch_size=20,
        max_steps=24,
        eval_strategy="steps",
        eval_steps=12,
        learning_rate=3e-3,
        logging_steps=6,
        save_strategy="no",
        report_to=[],
        use_cpu=True,
        disable_tqdm=True,
    )
    trainer = Trainer(
        model=GPT2LMHeadModel(config),
        args=arguments,
        train_dataset=rows[:-180],
        eval_dataset=rows[-180:],
        compute_metrics=compute_metrics,
        preprocess_logits_for_metrics=(lambda logits, labels: logits.argmax(-1)) if FIXED else None,
    )
    trainer.train()
