"""`sickbay train --from-pretrained` on folders as transformers writes them: what it trains from, and what it refuses."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import commands
import pytest
import torch

from sickbay.cli import train as command
from sickbay.core.errors import UsageError
from sickbay.reference.saving import checkpoint
from sickbay.reference.settings import settings
from sickbay.reference.text.tokenizer import CharTokenizer

transformers = pytest.importorskip("transformers")

POSITIONS = 16


def theirs(kind: str, folder: Path, text: Path) -> Any:
    """A model of transformers, saved with a tokenizer; it has more rows than the tokenizer has ids."""
    tokenizer = CharTokenizer.of_text(text)
    rows = tokenizer.vocab_size + 3
    torch.manual_seed(0)
    if kind == "gpt2":
        shape = {"n_embd": 16, "n_layer": 2, "n_head": 2, "n_positions": POSITIONS, "bos_token_id": 0, "eos_token_id": 0}
        model = transformers.GPT2LMHeadModel(transformers.GPT2Config(vocab_size=rows, **shape))
    else:
        shape = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "num_key_value_heads": 1, "intermediate_size": 24}
        model = transformers.LlamaForCausalLM(transformers.LlamaConfig(vocab_size=rows, max_position_embeddings=POSITIONS, **shape))
    model.save_pretrained(folder, max_shard_size="10KB")
    tokenizer.save(folder / "tokenizer.json")
    return model.eval()


def run(text: Path, folder: Path, out: Path, *words: str) -> None:
    options = ("--steps", "3", "--batch", "2", "--warmup", "0", "--eval-every", "0", "--json")
    assert commands.call(command, text, "--from-pretrained", folder, "--out", out, *options, *words) == 0


@pytest.mark.parametrize("kind", ["gpt2", "llama"])
def test_training_starts_from_their_weights_and_moves_them(kind: str, tmp_path: Path, text: Path) -> None:
    model = theirs(kind, tmp_path / "theirs", text)
    # A learning rate of next to nothing: what is not theirs would be a fresh start.
    run(text, tmp_path / "theirs", tmp_path / "still", "--lr", "1e-12", "--dropout", "0")
    run(text, tmp_path / "theirs", tmp_path / "moved", "--lr", "1e-2", "--dropout", "0")
    ids = torch.arange(POSITIONS)[None]
    with torch.no_grad():
        expected = model(ids).logits
        still, moved = (checkpoint.load_weights(checkpoint.read(tmp_path / name)).eval()(ids) for name in ("still", "moved"))
    torch.testing.assert_close(still, expected, atol=1e-4, rtol=0)
    assert (moved - expected).abs().max() > 0.01
    kept = settings.read(tmp_path / "moved" / "config.toml")[0]
    assert (kept["model"]["context"], kept["model"]["vocab_size"]) == (POSITIONS, expected.shape[-1])


def test_folders_that_cannot_be_a_start_are_refused_and_leave_nothing(tmp_path: Path, text: Path) -> None:
    def refusal(folder: Path) -> str:
        with pytest.raises(UsageError) as refused:
            run(text, folder, tmp_path / "out")
        assert not (tmp_path / "out").exists()
        return str(refused.value)

    assert "absent is no checkpoint folder: config.json: No such file" in refusal(tmp_path / "absent")
    folder = tmp_path / "theirs"
    theirs("gpt2", folder, text)
    (folder / "tokenizer.json").rename(tmp_path / "elsewhere.json")
    assert "has no tokenizer.json; name the one it was trained with: --tokenizer PATH" in refusal(folder)
    run(text, folder, tmp_path / "named", "--tokenizer", str(tmp_path / "elsewhere.json"))
    (tmp_path / "elsewhere.json").rename(folder / "tokenizer.json")
    for file in folder.glob("model*"):
        file.unlink()
    assert "it has no weights; give the folder that save_pretrained wrote" in refusal(folder)
    bert = transformers.BertConfig(vocab_size=70, hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=24)
    transformers.BertForMaskedLM(bert).save_pretrained(tmp_path / "bert")
    assert "model_type is 'bert'; it must be one of gpt2, llama" in refusal(tmp_path / "bert")
