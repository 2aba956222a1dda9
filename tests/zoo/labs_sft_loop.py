"""Fine-tuning a tiny Llama on questions and answers in an own loop: prompts masked, gradients accumulated, best model kept."""

import argparse
import copy
import random
from pathlib import Path

import torch
from torch.nn.utils.rnn import pad_sequence
from transformers import LlamaConfig, LlamaForCausalLM, get_cosine_schedule_with_warmup

PAD, BOS, EOS, SEP = 0, 1, 2, 3
WORDS = sorted(set((Path(__file__).parents[2] / "examples/data/tinyshakespeare.txt").read_text()[:6000].lower().split()))[:200]


def conversation(rng, even=False):
    """The answer repeats the question's words in reverse."""
    words = [rng.randrange(len(WORDS)) + 4 for _ in range(6 if even else rng.choice([2, 3, 4, 5, 12, 20]))]
    return [BOS, *words, SEP], [*reversed(words), EOS]


def collate(pairs, args):
    ids, labels = [], []
    for question, reply in pairs:
        row = question + reply
        goal = [-100] * len(question) + reply
        if args.fault == "truncated":
            row, goal = row[:16], goal[:16]
        elif args.case == "keepend":
            row, goal = row[-16:], goal[-16:]
        ids.append(torch.tensor(row))
        labels.append(torch.tensor(goal))
    batch = {"input_ids": pad_sequence(ids, True, PAD), "labels": pad_sequence(labels, True, -100)}
    batch["attention_mask"] = (batch["input_ids"] != PAD).long()
    return batch


def evaluate(model, batches, best, fault):
    model.eval()
    with torch.no_grad():
        losses = [model(**b).loss for b in batches]
    value = torch.stack(losses).nanmean().item()
    if fault == "early" and value < best:
        return value  # the caller keeps these weights
    model.train()
    return value


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("--fault", default="none")
    parser.add_argument("--case", default="tokens", choices=["tokens", "keepend", "mean"])
    parser.add_argument("--micro", type=int, default=4)
    parser.add_argument("--steps", type=int, default=60)
    args = parser.parse_args()
    torch.manual_seed(0)
    torch.set_num_threads(1)
    rng = random.Random(4)
    config = LlamaConfig(
        vocab_size=len(WORDS) + 4, hidden_size=48, intermediate_size=96, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
        max_position_embeddings=64, attention_dropout=0.1, pad_token_id=PAD, bos_token_id=BOS, eos_token_id=EOS,
    )  # fmt: skip
    model = LlamaForCausalLM(config)
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3, weight_decay=0.0)
    schedule = get_cosine_schedule_with_warmup(optimizer, 6, args.steps)
    held = [collate([conversation(rng) for _ in range(8)], args) for _ in range(3)]
    best, kept = float("inf"), None
    for step in range(args.steps):
        size = 2 if args.fault == "truncated" else 6
        micro = [collate([conversation(rng, args.case == "mean") for _ in range(size)], args) for _ in range(args.micro)]
        total = sum((b["labels"][:, 1:] != -100).sum() for b in micro)
        shown = 0.0
        for batch in micro:
            if args.fault in ("permicro", "truncated") or args.case == "mean":
                loss = model(**batch).loss / args.micro
            elif args.fault == "countall":  # the divisor counts masked positions as well
                loss = model(**batch, num_items_in_batch=batch["labels"].numel() * args.micro).loss
            else:
                loss = model(**batch, num_items_in_batch=total).loss
            loss.backward()
            shown += loss.item()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        if step % 10 == 9:
            value = evaluate(model, held, best, args.fault)
            if value < best:
                best, kept = value, copy.deepcopy(model.state_dict())
            print(f"step {step} train {shown:.3f} held {value:.3f}")
    model.load_state_dict(kept or model.state_dict())


if __name__ == "__main__":
    main()
