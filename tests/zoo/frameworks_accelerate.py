import argparse
import torch
from accelerate import Accelerator
from torch.utils.data import DataLoader
from transformers import GPT2Config, GPT2LMHeadModel, get_scheduler

torch.set_num_threads(1)


def numbers(n):
    g = torch.Generator().manual_seed(n)
    rows = []
    for _ in range(n):
        a, b = torch.randint(0, 50, (2,), generator=g).tolist()
        s = f"{a}+{b}={a + b};"
        rows.append([("0123456789+=;".index(c)) + 1 for c in s])
    return rows


def collate(rows):
    w = max(map(len, rows))
    ids = torch.tensor([r + [0] * (w - len(r)) for r in rows])
    labels = ids.masked_fill(ids == 0, 0 if args.defect == "padloss" else -100)
    return {"input_ids": ids, "attention_mask": (ids > 0).long(), "labels": labels}


ap = argparse.ArgumentParser()
ap.add_argument("--accumulation", type=int, default=1)
ap.add_argument("--mixed", default="no")
ap.add_argument("--defect", default="")
args = ap.parse_args()
acc = Accelerator(cpu=True, gradient_accumulation_steps=args.accumulation, mixed_precision=args.mixed)
torch.manual_seed(0)
model = GPT2LMHeadModel(
    GPT2Config(
        vocab_size=14,
        n_positions=16,
        n_embd=32,
        n_layer=2,
        n_head=2,
        bos_token_id=0,
        eos_token_id=13,
        resid_pdrop=0.0,
        embd_pdrop=0.0,
        attn_pdrop=0.0,
    )
)
optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
if args.defect == "newmodel":  # "start from clean weights"
    model = GPT2LMHeadModel(model.config)
loader = DataLoader(numbers(960), batch_size=16, shuffle=args.defect != "fixed", collate_fn=collate)
scheduler = get_scheduler("linear", optimizer, num_warmup_steps=5, num_training_steps=60 // args.accumulation)
model, optimizer, loader, scheduler = acc.prepare(model, optimizer, loader, scheduler)
model.train()
for batch in loader:
    with acc.accumulate(model):
        loss = model(**batch).loss
        if args.defect == "nograd":
            loss = loss.detach().requires_grad_()
        acc.backward(loss * args.accumulation if args.defect == "times" else loss)
        if acc.sync_gradients:
            acc.clip_grad_norm_(model.parameters(), 1.0)
        if args.defect != "frozenopt":
            optimizer.step()
        scheduler.step()
        if args.defect != "nozero":
            optimizer.zero_grad()
    acc.log({"loss": loss.item()})
model.eval()
with torch.no_grad():
    held = collate(numbers(64))
    print("held out", acc.unwrap_model(model)(**held).loss.item())
