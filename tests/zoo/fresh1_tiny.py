"""Karpathy-style single file, everything at module level."""
import sys, math, torch, torch.nn as nn
from torch.nn import functional as F
exec_opts = dict(width=64, layers=2, heads=4, ctx=32, batch=16, lr=1e-3, steps=200, eval=50, std=0.02, out_std=0.02, opt='adamw', clip=1.0, evalmode='light', data='numbers', dtype='f32', decay='none', gen='sample', accum=1, pin=0)
for arg in sys.argv[1:]:
    k, v = arg.lstrip('-').split('=')
    exec_opts[k] = type(exec_opts[k])(v)
globals().update(exec_opts)
torch.manual_seed(1337)
# ------------------------------------------------------------------ data
ones = 'zero one two three four five six seven eight nine'.split()
tens = 'twenty thirty forty fifty sixty seventy eighty ninety'.split()
teens = 'ten eleven twelve thirteen fourteen fifteen sixteen seventeen eighteen nineteen'.split()
def say(n):
    if n < 10: return ones[n]
    if n < 20: return teens[n - 10]
    if n < 100: return tens[n // 10 - 2] + ('-' + ones[n % 10] if n % 10 else '')
    return ones[n // 100] + ' hundred' + (' and ' + say(n % 100) if n % 100 else '')
if data == 'numbers':
    perm = torch.randperm(1000).tolist()
    text = '\n'.join(f'{n} is {say(n)}' for n in perm * 4)
else:
    text = open(__file__).read() * 3
vocab = sorted(set(text)); enc = {c: i for i, c in enumerate(vocab)}
ids = torch.tensor([enc[c] for c in text]); n = int(len(ids) * .9)
if data == 'self': n = len(ids) // 3
tr, va = ids[:n], ids[n:]
def get_batch(which):
    d = tr if which == 'train' else va
    ix = torch.randint(len(d) - ctx, (batch,))
    return torch.stack([d[i:i + ctx] for i in ix]), torch.stack([d[i + 1:i + 1 + ctx] for i in ix])
# ------------------------------------------------------------------ model
class Head(nn.Module):
    def __init__(self, hs):
        super().__init__()
        self.key = nn.Linear(width, hs, bias=False); self.query = nn.Linear(width, hs, bias=False); self.value = nn.Linear(width, hs, bias=False)
        self.register_buffer('tril', torch.tril(torch.ones(ctx, ctx)))
    def forward(self, x):
        B, T, C = x.shape
        k, q = self.key(x), self.query(x)
        w = q @ k.transpose(-2, -1) * k.shape[-1] ** -0.5
        w = F.softmax(w.masked_fill(self.tril[:T, :T] == 0, float('-inf')), -1)
        return w @ self.value(x)
class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.heads = nn.ModuleList([Head(width // heads) for _ in range(heads)]); self.proj = nn.Linear(width, width)
        self.ffwd = nn.Sequential(nn.Linear(width, 4 * width), nn.ReLU(), nn.Linear(4 * width, width))
        self.ln1, self.ln2 = nn.LayerNorm(width), nn.LayerNorm(width)
    def forward(self, x):
        x = x + self.proj(torch.cat([h(self.ln1(x)) for h in self.heads], -1))
        return x + self.ffwd(self.ln2(x))
class BigramNoMore(nn.Module):
    def __init__(self):
        super().__init__()
        self.token_embedding_table = nn.Embedding(len(vocab), width); self.position_embedding_table = nn.Embedding(ctx, width)
        self.blocks = nn.Sequential(*[Block() for _ in range(layers)]); self.ln_f = nn.LayerNorm(width); self.lm_head = nn.Linear(width, len(vocab))
        self.apply(self._init_weights); nn.init.normal_(self.lm_head.weight, std=out_std)
    def _init_weights(self, m):
        if isinstance(m, (nn.Linear, nn.Embedding)):
            if std == 0: nn.init.zeros_(m.weight)
            else: nn.init.normal_(m.weight, mean=0.0, std=std)
        if isinstance(m, nn.Linear) and m.bias is not None: nn.init.zeros_(m.bias)
    def forward(self, idx, targets=None):
        B, T = idx.shape
        x = self.token_embedding_table(idx) + self.position_embedding_table(torch.arange(T))
        logits = self.lm_head(self.ln_f(self.blocks(x)))
        if targets is None: return logits, None
        B, T, C = logits.shape
        return logits, F.cross_entropy(logits.view(B * T, C).float(), targets.view(B * T))
    @torch.no_grad()
    def generate(self, idx, max_new_tokens):
        for _ in range(max_new_tokens):
            logits, _ = self(idx[:, -ctx:])
            logits = logits[:, -1, :].float()
            if gen == 'greedy': nxt = logits.argmax(-1, keepdim=True)
            elif gen == 'hot': nxt = torch.multinomial(F.softmax(logits / 3.0, -1), 1)
            else: nxt = torch.multinomial(F.softmax(logits, -1), 1)
            idx = torch.cat((idx, nxt), 1)
        return idx
model = BigramNoMore()
if dtype == 'bf16': model = model.bfloat16()
if opt == 'adamw': optimizer = torch.optim.AdamW(model.parameters(), lr=lr)
elif opt == 'adam1': optimizer = torch.optim.Adam(model.parameters(), lr=lr)
else: optimizer = torch.optim.SGD(model.parameters(), lr=lr)
if decay == 'perstep': sched = torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.9)      # copied from a per-epoch recipe
elif decay == 'cos': sched = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps, eta_min=lr / 10)
elif decay == 'unstepped': sched = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
else: sched = None
kept = []
def estimate_loss():
    out = {}
    model.eval()
    for s in ('train', 'val'):
        losses, keep = torch.zeros(10), []
        for k in range(10):
            X, Y = get_batch(s)
            logits, loss = model(X, Y)
            losses[k] = loss.item()
            if evalmode == 'logits': keep.append(logits); kept.append(logits)
        out[s] = losses.mean().item()
    model.train()
    return out
if evalmode == 'light': estimate_loss = torch.no_grad()(estimate_loss)
if evalmode == 'logits': estimate_loss = torch.no_grad()(estimate_loss)
for it in range(steps):
    if eval and it % eval == 0:
        l = estimate_loss(); print(f"step {it}: train {l['train']:.4f}, val {l['val']:.4f}")
    optimizer.zero_grad(set_to_none=True)
    for _ in range(accum):
        xb, yb = get_batch('train')
        _, loss = model(xb, yb)
        (loss / accum).backward()
    if clip: torch.nn.utils.clip_grad_norm_(model.parameters(), clip)
    optimizer.step()
    if sched and decay != 'unstepped': sched.step()
print(loss.item())
if gen != 'none':
    print(''.join(vocab[i] for i in model.generate(torch.zeros((1, 1), dtype=torch.long), 200)[0].tolist()))
