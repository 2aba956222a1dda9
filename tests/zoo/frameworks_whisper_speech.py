# Speech to letters: Whisper-style encoder-decoder and a CTC model on made-up spectrograms.
import sys

import torch
import torch.nn.functional as F
from transformers import Wav2Vec2Config, Wav2Vec2ForCTC, WhisperConfig, WhisperForConditionalGeneration

torch.set_num_threads(1)
torch.manual_seed(0)
kind, slip = (sys.argv[1:] + ["whisper", ""])[:2] if len(sys.argv) > 2 else ((sys.argv[1] if len(sys.argv) > 1 else "whisper"), "")
LETTERS = torch.randn(20, 8)


def utterances(n, frames):
    length = torch.randint(3, 7, (n,))
    text = torch.randint(3, 20, (n, 7))
    sound = LETTERS[text].repeat_interleave(frames // 7, 1)[:, : frames // 7 * 7]
    sound = F.pad(sound, (0, 0, 0, frames - sound.shape[1])) + 0.1 * torch.randn(n, frames, 8)
    labels = text.masked_fill(torch.arange(7) >= length[:, None], -100)
    labels = torch.cat([labels, torch.full((n, 1), -100)], 1)
    labels[torch.arange(n), length] = 2
    return sound.transpose(1, 2), labels


if kind == "whisper":
    m = WhisperForConditionalGeneration(
        WhisperConfig(
            vocab_size=24,
            num_mel_bins=8,
            d_model=32,
            encoder_layers=1,
            decoder_layers=2,
            encoder_attention_heads=4,
            decoder_attention_heads=4,
            encoder_ffn_dim=64,
            decoder_ffn_dim=64,
            max_source_positions=28,
            max_target_positions=16,
            pad_token_id=0,
            bos_token_id=1,
            eos_token_id=2,
            decoder_start_token_id=1,
            begin_suppress_tokens=None,
            suppress_tokens=None,
        )
    )
else:
    m = Wav2Vec2ForCTC(
        Wav2Vec2Config(
            vocab_size=24,
            hidden_size=32,
            num_hidden_layers=2,
            num_attention_heads=4,
            intermediate_size=64,
            conv_dim=(16, 16),
            conv_stride=(4, 2),
            conv_kernel=(6, 3),
            num_conv_pos_embeddings=8,
            num_conv_pos_embedding_groups=4,
            pad_token_id=0,
            ctc_zero_infinity=slip != "inf",
            mask_time_prob=0.0,
            feat_extract_norm="group",
        )
    )
optim = torch.optim.AdamW(m.parameters(), lr=1e-3)
m.train()
for it in range(40):
    sound, labels = utterances(8, 56)
    if kind == "whisper":
        extra = {"decoder_input_ids": labels.clamp(min=0)} if slip == "unshifted" else {}
        out = m(input_features=sound, labels=labels, **extra)
    else:
        wave = sound.transpose(1, 2).reshape(8, -1)[:, : 60 if slip == "inf" else 448]
        out = m(input_values=wave, labels=labels)
    optim.zero_grad()
    out.loss.backward()
    torch.nn.utils.clip_grad_norm_(m.parameters(), 1.0)
    optim.step()
    if it % 10 == 0:
        print(it, out.loss.item())
