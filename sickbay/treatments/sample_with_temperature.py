"""The next token is drawn from the likeliest ones instead of always being the first.

Advice: `generate(do_sample=True, temperature=0.8, top_k=50)`, or by hand `softmax(logits / 0.8)` over the 50 highest logits and
`torch.multinomial`. A temperature of 0 means the first choice, and is no divisor.
"""

from __future__ import annotations

from sickbay.core.treatment import Treatment

treatment = Treatment(
    id="sample-with-temperature",
    safety="advice",
    summary="Draw the next token: temperature 0.8, and top-k 50 or top-p 0.9, instead of taking the likeliest each time.",
)
