"""No real position reads padding.

Advice: `attention_mask=(ids != pad_id)` for transformers, `src_key_padding_mask=(ids == pad_id)` for nn.TransformerEncoder, and for a mean
over positions divide the masked sum by the number of real ones.
"""

from __future__ import annotations

from sickbay.core.treatment import Treatment

treatment = Treatment(
    id="pad-mask",
    safety="advice",
    summary="Pass the padding mask to attention (attention_mask, src_key_padding_mask), and pool over real positions only.",
)
