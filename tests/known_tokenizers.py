"""Tokenizers of the kinds that known models have, made of a small text."""

from __future__ import annotations

import json

import tokenizers
from tokenizers import Regex, decoders, models, normalizers, pre_tokenizers, trainers

from sickbay.reference.data import shipped_text
from sickbay.reference.text.bpe import train_bpe

# Meta's published pattern.
LLAMA_3 = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
OTHER = "Größe und Maß: naïve café, 42 — 1,234,567!\r\n\r\n数据。模型在学习。 😀👍🏽 \tx = {a: 1};\n\n  не знаю  …  हिन्दी में\n" * 8
TEXT = shipped_text().read_text(encoding="utf-8")[:6000] + OTHER + "f (x);\n a \n  b\t\n" * 60
ALPHABET = pre_tokenizers.ByteLevel.alphabet()


def gpt2() -> tokenizers.Tokenizer:
    return train_bpe([TEXT], 400).library


def llama3() -> tokenizers.Tokenizer:
    made = tokenizers.Tokenizer(models.BPE(ignore_merges=True))
    made.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Split(Regex(LLAMA_3), "isolated"), pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)]
    )
    made.decoder = decoders.ByteLevel()
    special = ["<|begin_of_text|>", "<|end_of_text|>"]
    made.train_from_iterator([TEXT], trainers.BpeTrainer(vocab_size=400, special_tokens=special, initial_alphabet=ALPHABET))
    return made


def llama2() -> tokenizers.Tokenizer:
    """SentencePiece's BPE as transformers converts it: no pre-tokenizer, spaces are marks, unknown characters are bytes."""
    made = tokenizers.Tokenizer(models.BPE(unk_token="<unk>", fuse_unk=True, byte_fallback=True))
    made.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    made.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(content=" ", left=1)]
    )
    special = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256))]
    made.pre_tokenizer = pre_tokenizers.Split("▁", "merged_with_next")
    made.train_from_iterator([TEXT], trainers.BpeTrainer(vocab_size=500, special_tokens=special, limit_alphabet=60))
    held = json.loads(made.to_str())
    held["pre_tokenizer"] = None
    held["added_tokens"] = held["added_tokens"][:3]
    return tokenizers.Tokenizer.from_str(json.dumps(held))


def unigram() -> tokenizers.Tokenizer:
    made = tokenizers.Tokenizer(models.Unigram())
    made.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first")
    made.decoder = decoders.Metaspace(prepend_scheme="first")
    made.train_from_iterator([TEXT], trainers.UnigramTrainer(vocab_size=300, special_tokens=["<unk>", "</s>"], unk_token="<unk>"))
    return made


def bert() -> tokenizers.Tokenizer:
    made = tokenizers.Tokenizer(models.WordPiece(unk_token="[UNK]"))
    made.normalizer = normalizers.BertNormalizer()
    made.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    made.train_from_iterator([TEXT], trainers.WordPieceTrainer(vocab_size=300, special_tokens=["[UNK]", "[SEP]"]))
    return made
