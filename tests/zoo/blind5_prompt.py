"""Soft prompt tuning (Lester et al.): the language model stays as it is, only a few input vectors are learnt.

The frozen model knows three manners of rewriting a string (same, mirrored, next letter), each asked for by
a control word. The soft prompt has to find 'mirrored' without being given the word."""
import argparse, logging
import torch
from torch import nn
from transformers import GPT2Config, GPT2LMHeadModel

logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s", datefmt="%H:%M:%S")
log = logging.getLogger("prompt-tuning")

N, LET = 5, 16
CONTROL, SEP, VOCAB = {"same": 16, "mirror": 17, "next": 18}, 19, 20


def answer(s, how):
    return {"same": s, "mirror": s.flip(1), "next": (s + 1) % LET}[how]


def base_model(steps):
    net = GPT2LMHeadModel(GPT2Config(vocab_size=VOCAB, n_positions=32, n_embd=80, n_layer=2, n_head=4, resid_pdrop=0.0,
                                     embd_pdrop=0.0, attn_pdrop=0.0, bos_token_id=0, eos_token_id=0))
    opt = torch.optim.AdamW(net.parameters(), lr=2e-3, weight_decay=0.0)
    ramp = torch.optim.lr_scheduler.LinearLR(opt, 0.05, 1.0, 25)
    for i in range(steps):
        s = torch.randint(0, LET, (48, N))
        rows = []
        for j, (how, tok) in enumerate(CONTROL.items()):
            part = s[j::3]
            rows.append(torch.cat([torch.full((len(part), 4), tok), part, torch.full((len(part), 1), SEP),
                                   answer(part, how)], 1))
        ids = torch.cat(rows)
        labels = ids.clone()
        labels[:, :4 + N + 1] = -100
        loss = net(input_ids=ids, labels=labels).loss
        opt.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(net.parameters(), 1.0)
        opt.step()
        ramp.step()
        if i % 60 == 0 or i == steps - 1:
            log.info("base %4d loss %.3f", i, loss.item())
    return net


class PromptTuned(nn.Module):
    def __init__(self, lm, length=4):
        super().__init__()
        self.lm = lm.eval()
        for p in self.lm.parameters():
            p.requires_grad = False
        self.prompt = nn.Parameter(torch.empty(length, lm.config.n_embd).uniform_(-0.05, 0.05))

    def init_from_vocabulary(self, ids):
        """Start from the embeddings of real tokens, which trains faster than noise."""
        with torch.no_grad():
            self.prompt.copy_(self.lm.get_input_embeddings()(ids))

    def forward(self, ids, labels=None):
        e = self.lm.get_input_embeddings()(ids)
        p = self.prompt.expand(len(ids), -1, -1)
        if labels is not None:
            labels = torch.cat([labels.new_full((len(ids), self.prompt.shape[0]), -100), labels], 1)
        return self.lm(inputs_embeds=torch.cat([p, e], 1), labels=labels)


def batch(n):
    s = torch.randint(0, LET, (n, N))
    ids = torch.cat([s, torch.full((n, 1), SEP), answer(s, "mirror")], 1)
    labels = ids.clone()
    labels[:, : N + 1] = -100
    return ids, labels


def main():
    ap = argparse.ArgumentParser()
    ap.add_argument("--base-steps", type=int, default=330)
    ap.add_argument("--steps", type=int, default=160)
    ap.add_argument("--lr", type=float, default=0.05)
    a = ap.parse_args()
    torch.manual_seed(2)
    model = PromptTuned(base_model(a.base_steps))
    model.init_from_vocabulary(torch.randint(0, LET, (4,)))
    optimizer = torch.optim.Adam([p for p in model.parameters() if p.requires_grad], lr=a.lr)
    log.info("trainable %d of %d", sum(p.numel() for p in model.parameters() if p.requires_grad),
             sum(p.numel() for p in model.parameters()))
    for i in range(a.steps):
        ids, labels = batch(24)
        loss = model(ids, labels).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        if i % 20 == 0 or i == a.steps - 1:
            log.info("prompt %4d loss %.3f", i, loss.item())
    with torch.no_grad():
        ids, labels = batch(256)
        lg = model(ids).logits[:, model.prompt.shape[0]:]
        hit = (lg[:, N:-1].argmax(-1) == ids[:, N + 1:]).float().mean()
    log.info("letters right %.3f", hit.item())


if __name__ == "__main__":
    main()
