"""byte LM + chatty sampling with an own key/value cache.   usage: fresh1_bytes.py [--steps N] [--decode MODE] ..."""
import pathlib, sys, time
import torch, torch.nn as nn, torch.nn.functional as F

def flag(name, default, kind=str):
    return kind(sys.argv[sys.argv.index(name) + 1]) if name in sys.argv else default

steps, decode, lr = flag("--steps", 300, int), flag("--decode", "topk"), flag("--lr", 3e-3, float)
temperature, cachebug = flag("--temp", 0.9, float), flag("--cache", "right")
torch.manual_seed(1234)

root = pathlib.Path(pathlib.__file__)
root = root if root.name != "__init__.py" else root.parent
lib = pathlib.Path(__import__("os").__file__).parent
raw = b"".join((lib / n).read_bytes() for n in ("textwrap.py", "heapq.py", "bisect.py", "shlex.py", "calendar.py", "string.py"))
data = torch.frombuffer(bytearray(raw), dtype=torch.uint8).long()
n_val = len(data) // 10
train, val = data[:-n_val], data[-n_val:]
B, T, C, L, NH = 16, 48, 64, 2, 4


class Block(nn.Module):
    def __init__(s):
        super().__init__()
        s.ln1, s.ln2 = nn.LayerNorm(C), nn.LayerNorm(C)
        s.qkv, s.proj = nn.Linear(C, 3 * C), nn.Linear(C, C)
        s.fc, s.back = nn.Linear(C, 4 * C), nn.Linear(4 * C, C)

    def forward(s, x, past=None):
        b, t, _ = x.shape
        q, k, v = s.qkv(s.ln1(x)).reshape(b, t, 3, NH, C // NH).permute(2, 0, 3, 1, 4)
        if past is not None and past[0] is not None:
            k, v = torch.cat([past[0], k], 2), torch.cat([past[1], v], 2)
        y = F.scaled_dot_product_attention(q, k, v, is_causal=past is None or t > 1)
        x = x + s.proj(y.transpose(1, 2).reshape(b, t, C))
        x = x + s.back(F.gelu(s.fc(s.ln2(x))))
        return x, (k, v)


class ByteLM(nn.Module):
    def __init__(s):
        super().__init__()
        s.tok, s.pos = nn.Embedding(256, C), nn.Embedding(512, C)
        s.blocks, s.ln, s.head = nn.ModuleList(Block() for _ in range(L)), nn.LayerNorm(C), nn.Linear(C, 256)
        nn.init.normal_(s.tok.weight, std=0.02); nn.init.normal_(s.pos.weight, std=0.02)

    def forward(s, ids, cache=None, start=0):
        x = s.tok(ids) + s.pos(torch.arange(start, start + ids.shape[1]))
        kept = []
        for i, b in enumerate(s.blocks):
            x, kv = b(x, None if cache is None else cache[i])
            kept.append(kv)
        return s.head(s.ln(x)), kept


def get(split):
    i = torch.randint(len(split) - T - 1, (B,))
    return torch.stack([split[j:j + T] for j in i]), torch.stack([split[j + 1:j + T + 1] for j in i])


model = ByteLM()
opt = torch.optim.AdamW(model.parameters(), lr=lr, betas=(0.9, 0.95))
sched = torch.optim.lr_scheduler.OneCycleLR(opt, lr, total_steps=steps, pct_start=0.1)
t0 = time.time()
for step in range(steps):
    x, y = get(train)
    logits, _ = model(x)
    loss = F.cross_entropy(logits.view(-1, 256), y.view(-1))
    opt.zero_grad(); loss.backward()
    nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    opt.step(); sched.step()
    if step % 50 == 0 or step == steps - 1:
        with torch.no_grad():
            vl = sum(F.cross_entropy(model(a)[0].view(-1, 256), b.view(-1)).item() for a, b in (get(val) for _ in range(4))) / 4
        print(f"{step:4d} {loss.item():.3f} val {vl:.3f} {time.time() - t0:.0f}s")


def pick(logits):
    if decode == "greedy":
        return logits.argmax(-1, keepdim=True)
    logits = logits / temperature
    if decode == "topk":
        v, _ = logits.topk(20)
        logits = logits.masked_fill(logits < v[:, -1:], -torch.inf)
    if decode == "topp":
        s, i = logits.sort(descending=True)
        p = s.softmax(-1)
        s = s.masked_fill(p.cumsum(-1) - p > 0.9, -torch.inf)
        logits = torch.full_like(logits, -torch.inf).scatter(-1, i, s)
    return torch.multinomial(logits.softmax(-1), 1)


@torch.no_grad()
def sample(prompt, n):
    model.eval()
    ids = torch.tensor([list(prompt)])
    out = ids
    if cachebug == "none":
        for _ in range(n):
            logits, _ = model(out[:, -T:])
            out = torch.cat([out, pick(logits[:, -1])], 1)
    else:
        logits, cache = model(ids, [(None, None)] * L)
        for _ in range(n):
            nxt = pick(logits[:, -1])
            out = torch.cat([out, nxt], 1)
            start = {"right": out.shape[1] - 1, "late": out.shape[1], "zero": 0}[cachebug]
            logits, cache = model(nxt, cache, start)
    return bytes(out[0].tolist())


for prompt in (b"def ", b"    # ", b"import"):
    print(repr(sample(prompt, T - len(prompt) - 1 if cachebug != "none" else 120).decode("utf8", "replace")))
