"""Pruned vocabularies decode every text, keep the ids of what they kept and the model's logits for them; statistics are counts."""

from __future__ import annotations

import functools
import json
import math
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import commands
import numpy as np
import pytest
import tokenizers
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file

from sickbay.cli import main as command_line
from sickbay.cli import vocab as vocab_command
from sickbay.core.errors import UsageError
from sickbay.reference.data.sources import Text
from sickbay.reference.models.config import Config
from sickbay.reference.models.model import Transformer
from sickbay.reference.saving import checkpoint
from sickbay.reference.text import prune, vocab
from sickbay.reference.text.bpe import LibraryTokenizer
from sickbay.reference.text.prune import Pruned
from sickbay.reference.text.prune_checkpoint import prune_checkpoint
from sickbay.reference.text.tokenizer import ByteTokenizer, CharTokenizer, Tokenizer, load
from tests.known_tokenizers import TEXT, bert, gpt2, llama2, llama3

PLAY = TEXT[:3000]
words = st.sampled_from(sorted(set(TEXT.split()))) | st.sampled_from([" ", "\r\n", "  ", "😀", "数据", ";\n", "1234"])
texts = st.lists(words | st.text(st.characters(exclude_categories=("Cs",)), max_size=4), max_size=25).map(" ".join)


def counts_of(tokenizer: Tokenizer, text: str) -> vocab.Counts:
    return vocab.Counts(np.bincount(tokenizer.encode(text), minlength=tokenizer.vocab_size), len(text.encode()))


def file_of(folder: Path, text: str) -> Text:
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / "text.txt"
    path.write_text(text, encoding="utf-8", newline="")
    return Text.at([path])


@pytest.fixture(scope="module", params=[gpt2, llama3, llama2], ids=lambda make: make.__name__)
def library(request: pytest.FixtureRequest) -> LibraryTokenizer:
    make: Callable[[], tokenizers.Tokenizer] = request.param
    return LibraryTokenizer(make())


@pytest.fixture(scope="module")
def pruned(library: LibraryTokenizer) -> Pruned:
    made = prune.prune(library, counts_of(library, PLAY), 330)
    assert made.tokenizer.vocab_size == 330 < library.vocab_size
    return made


@functools.cache
def kept_words(library: LibraryTokenizer, pruned: Pruned) -> list[str]:
    """Words that the whole tokenizer makes of kept tokens, at the beginning of a text and behind a space."""
    candidates = [*dict.fromkeys(TEXT.split()), "\r\n", "😀", ";\n", "1234"]
    return [word for word in candidates if all(np.isin(library.encode(text), pruned.kept).all() for text in (word, " " + word))]


@settings(deadline=None, max_examples=300)
@given(text=texts)
def test_a_pruned_tokenizer_decodes_what_the_whole_one_decodes(library: LibraryTokenizer, pruned: Pruned, text: str) -> None:
    ids = pruned.tokenizer.encode(text)
    assert ((ids >= 0) & (ids < 330)).all()
    assert pruned.tokenizer.decode(ids) == library.decode(library.encode(text))


@settings(deadline=None, max_examples=300)
@given(data=st.data())
def test_a_text_of_kept_tokens_keeps_them(library: LibraryTokenizer, pruned: Pruned, data: st.DataObject) -> None:
    text = " ".join(data.draw(st.lists(st.sampled_from(kept_words(library, pruned)), min_size=1)))
    old = library.encode(text)
    assume(np.isin(old, pruned.kept).all())  # white space beside white space may merge to a token that was dropped
    assert pruned.kept[pruned.tokenizer.encode(text)].tolist() == old.tolist()


def test_merged_tokens_are_kept_and_dropped(library: LibraryTokenizer, pruned: Pruned) -> None:
    long = [word for word in kept_words(library, pruned) if len(word) > len(library.encode(word))]
    assert len(long) > 20, "the property above would hold of single characters alone"
    assert len(pruned.kept) < library.vocab_size
    dropped_words = [word for word in TEXT.split() if not np.isin(library.encode(" " + word), pruned.kept).all()]
    assert dropped_words, "nothing was dropped that a text uses"


def test_what_never_goes_stays(library: LibraryTokenizer, pruned: Pruned) -> None:
    assert set(library.special) <= set(pruned.kept.tolist())
    assert pruned.tokenizer.special == {pruned.new_id(old): text for old, text in library.special.items()}
    assert pruned.tokenizer.special[pruned.tokenizer.end_of_text or 0] == library.special[library.end_of_text or 0]
    alphabet = [f"<0x{byte:02X}>" for byte in range(256)]
    if library.library.token_to_id(alphabet[0]) is None:
        alphabet = tokenizers.pre_tokenizers.ByteLevel.alphabet()
    assert {library.library.token_to_id(text) for text in alphabet} <= set(pruned.kept.tolist())


def test_ids_keep_their_order_and_the_most_frequent_stay(library: LibraryTokenizer) -> None:
    counts = counts_of(library, PLAY)
    made = prune.prune(library, counts, 330)
    again = prune.prune(library, counts, 330)
    assert (np.diff(made.kept) > 0).all()
    assert made.tokenizer.library.to_str() == again.tokenizer.library.to_str()
    merged = [number for number in counts.order().tolist() if len(library.library.id_to_token(number)) > 1 and counts.of[number]]
    assert set(merged[:15]) <= set(made.kept.tolist())
    dropped = set(range(library.vocab_size)) - set(made.kept.tolist())
    assert max(counts.of[list(dropped)]) < counts.of[merged[0]]


def test_of_equally_frequent_tokens_the_lower_ids_stay() -> None:
    tokenizer = LibraryTokenizer(gpt2())
    made = prune.prune(tokenizer, vocab.Counts(np.zeros(400, dtype=np.int64), 0), 300)
    assert made.kept.tolist() == list(range(300)), "the trainer's merges rise: each is made of lower ids"


def test_without_a_number_every_token_that_came_is_kept(library: LibraryTokenizer) -> None:
    made = prune.prune(library, counts_of(library, PLAY))
    assert made.tokenizer.vocab_size < library.vocab_size
    assert made.kept[made.tokenizer.encode(PLAY)].tolist() == library.encode(PLAY).tolist()


def test_a_template_around_texts_names_its_tokens_by_their_new_ids() -> None:
    made = llama3()
    end, begin = made.token_to_id("<|end_of_text|>"), made.token_to_id("<|begin_of_text|>")
    held = json.loads(made.to_str())
    # The special tokens last, as Llama 3 has them: their ids change.
    shift = {text: number - 2 if number > 1 else 398 + number for text, number in held["model"]["vocab"].items()}
    held["model"]["vocab"] = {text: number for text, number in shift.items() if number < 398}
    held["added_tokens"] = [{**token, "id": shift[token["content"]]} for token in held["added_tokens"]]
    moved = tokenizers.Tokenizer.from_str(json.dumps(held))
    moved.post_processor = tokenizers.processors.TemplateProcessing(
        single="<|begin_of_text|> $A <|end_of_text|>",
        special_tokens=[("<|begin_of_text|>", 398 + begin), ("<|end_of_text|>", 398 + end)],
    )
    tokenizer = LibraryTokenizer(moved)
    smaller = prune.prune(tokenizer, counts_of(tokenizer, PLAY), 350).tokenizer
    assert smaller.special == {348: "<|begin_of_text|>", 349: "<|end_of_text|>"}
    assert smaller.library.encode("the king").ids == [348, *smaller.encode("the king").tolist(), 349]


@pytest.mark.parametrize(
    ("make", "keep", "words"),
    [
        (lambda: CharTokenizer("abc "), None, "only BPE can be pruned"),
        (ByteTokenizer, None, "only BPE can be pruned"),
        (lambda: LibraryTokenizer(bert()), None, "WordPiece; only BPE"),
        (lambda: LibraryTokenizer(gpt2()), 256, "keep is 256; it must be from 257 .* to 400"),
        (lambda: LibraryTokenizer(gpt2()), 401, "keep is 401; it must be from 257 .* to 400"),
    ],
)
def test_what_cannot_be_pruned_is_refused(make: Callable[[], Tokenizer], keep: int | None, words: str) -> None:
    tokenizer = make()
    with pytest.raises(ValueError, match=words):
        prune.prune(tokenizer, vocab.Counts(np.ones(tokenizer.vocab_size, dtype=np.int64), 1), keep)


def run_of(folder: Path, tied: bool, pad_id: int | None = None) -> checkpoint.State:
    """A checkpoint whose optimizer has taken a step."""
    torch.manual_seed(3)
    config = Config(dim=16, num_layers=1, num_heads=2, vocab_size=400, context=32, tied_embeddings=tied, pad_id=pad_id)
    model = Transformer(config)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1)
    model(torch.arange(1, 31)[None]).square().mean().backward()
    optimizer.step()
    checkpoint.save(folder, step=1, model=model, optimizer=optimizer, recipe={}, source="", tokenizer=LibraryTokenizer(gpt2()))
    return checkpoint.read(folder)


@pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])
def test_a_pruned_checkpoint_of_ours_has_the_kept_rows_and_their_logits(tmp_path: Path, tied: bool) -> None:
    old = run_of(tmp_path / "run", tied, pad_id=399)
    made = prune_checkpoint(tmp_path / "run", file_of(tmp_path, PLAY), tmp_path / "small", 330)
    new = checkpoint.read(tmp_path / "small")
    kept = json.loads((new.folder / "kept_ids.json").read_text())
    assert (new.config.vocab_size, new.tokenizer.vocab_size, len(kept), made.vocab_size) == (330, 330, 330, 330)
    assert kept[new.config.pad_id or 0] == 399

    ids = torch.from_numpy(new.tokenizer.encode(PLAY[:40]))[None]
    was = checkpoint.load_weights(old).eval()(torch.tensor(kept)[ids])
    torch.testing.assert_close(checkpoint.load_weights(new).eval()(ids), was[..., kept], rtol=1e-5, atol=1e-6)

    before, after = (load_file(state.folder / "optimizer.safetensors") for state in (old, new))
    assert before.keys() == after.keys()
    for name, value in before.items():
        of_rows = name.startswith(("token_embedding", "head")) and value.dim() > 0
        assert torch.equal(after[name], value[kept] if of_rows else value), name
    model = checkpoint.load_weights(new)
    checkpoint.restore(new, model, torch.optim.AdamW(model.parameters()))
    rows = 70 * 16 * (1 if tied else 2)
    assert made.old_parameters - made.parameters == rows


def transformers_model(kind: str, tied: bool) -> Any:
    import transformers

    torch.manual_seed(0)
    if kind == "gpt2":
        made = LibraryTokenizer(gpt2())
        config: Any = transformers.GPT2Config(
            vocab_size=410, n_positions=64, n_embd=16, n_layer=1, n_head=2, tie_word_embeddings=tied, bos_token_id=0, eos_token_id=0
        )
        return transformers.GPT2LMHeadModel(config).eval(), made
    made = LibraryTokenizer(llama2())
    config = transformers.LlamaConfig(
        vocab_size=made.vocab_size,
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=1,
        num_attention_heads=2,
        max_position_embeddings=64,
        tie_word_embeddings=tied,
        bos_token_id=1,
        eos_token_id=2,
    )
    return transformers.LlamaForCausalLM(config).eval(), made


@pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])
@pytest.mark.parametrize("kind", ["gpt2", "llama"])
@pytest.mark.parametrize("shard", ["50GB", "20KB"], ids=["one file", "several files"])
def test_a_pruned_folder_of_transformers_has_the_kept_rows_and_their_logits(tmp_path: Path, kind: str, tied: bool, shard: str) -> None:
    import transformers

    model, tokenizer = transformers_model(kind, tied)
    model.save_pretrained(tmp_path / "old", max_shard_size=shard)
    transformers.PreTrainedTokenizerFast(
        tokenizer_object=tokenizer.library, eos_token=tokenizer.special[tokenizer.end_of_text]
    ).save_pretrained(tmp_path / "old")
    several = len(list((tmp_path / "old").glob("*.safetensors"))) > 1
    assert several == (shard == "20KB")
    prune_checkpoint(tmp_path / "old", file_of(tmp_path, PLAY), tmp_path / "new", 330)

    new = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "new").eval()
    theirs = transformers.PreTrainedTokenizerFast.from_pretrained(tmp_path / "new")
    kept = torch.tensor(json.loads((tmp_path / "new" / "kept_ids.json").read_text()))
    ours = load(tmp_path / "new")
    assert new.config.vocab_size == ours.vocab_size == len(kept) == 330
    assert kept[new.config.eos_token_id] == model.config.eos_token_id
    assert kept[new.generation_config.eos_token_id] == model.generation_config.eos_token_id
    assert theirs(PLAY, add_special_tokens=False)["input_ids"] == ours.encode(PLAY).tolist()
    assert theirs.eos_token_id == ours.end_of_text

    ids = torch.from_numpy(ours.encode(PLAY)[:40])[None]
    with torch.no_grad():
        torch.testing.assert_close(new(ids).logits, model(kept[ids]).logits[..., kept], rtol=1e-5, atol=1e-6)


def spoiled(folder: Path, change: str) -> None:
    config = json.loads((folder / "config.json").read_text())
    if change == "suppresses":
        (folder / "generation_config.json").write_text('{"suppress_tokens": [5]}')
    elif change == "no tokenizer":
        (folder / "tokenizer.json").unlink()
    elif change == "no weights":
        (folder / "model.safetensors").unlink()
    elif change == "other rows":
        (folder / "config.json").write_text(json.dumps({**config, "vocab_size": 420}))
    else:
        (folder / "config.json").write_text(json.dumps({**config, "quantization_config": {}}))


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ("suppresses", "sets suppress_tokens, whose ids cannot be renumbered"),
        ("no tokenizer", "holds no tokenizer.json"),
        ("no weights", "holds no safetensors file"),
        ("other rows", r"wte.weight has shape \(410, 16\); its first number should be vocab_size, 420"),
        ("quantised", "quantised: it cannot be pruned"),
    ],
)
def test_a_folder_that_cannot_be_pruned_is_refused_and_nothing_is_written(tmp_path: Path, change: str, words: str) -> None:
    model, tokenizer = transformers_model("gpt2", True)
    model.save_pretrained(tmp_path / "old")
    tokenizer.save(tmp_path / "old" / "tokenizer.json")
    spoiled(tmp_path / "old", change)
    with pytest.raises(ValueError, match=words):
        prune_checkpoint(tmp_path / "old", file_of(tmp_path, PLAY), tmp_path / "new", 330)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["old", "text.txt"]


@pytest.mark.parametrize("text", [TEXT, "to be, or not to be", "a"])
def test_statistics_are_counts(tmp_path: Path, text: str) -> None:
    tokenizer = LibraryTokenizer(gpt2())
    told = vocab.use(vocab.count_ids(file_of(tmp_path, text), tokenizer), tokenizer)
    counted = Counter(tokenizer.encode(text).tolist())
    assert told.tokens == counted.total()
    assert told.bytes_per_token == len(text.encode()) / counted.total()
    assert (told.used, told.once) == (len(counted), sum(times == 1 for times in counted.values()))
    assert set(told.unused) == set(range(400)) - counted.keys()
    assert told.special == 1
    ranked = sorted(counted.values(), reverse=True)
    for share, needed in told.coverage.items():
        assert sum(ranked[:needed]) >= share * counted.total() > sum(ranked[: needed - 1])
    best = min(counted, key=lambda number: (-counted[number], number))
    assert told.most_frequent[0] == (best, tokenizer.decode([best]), counted[best] / counted.total())


@pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])
def test_the_cost_of_rows_is_the_models(tmp_path: Path, tied: bool) -> None:
    state = run_of(tmp_path / "run", tied)
    cost = vocab.cost(state.folder)
    model = checkpoint.load_weights(state)
    assert cost is not None
    rows = 400 * 16 * cost.matrices
    total = sum(parameter.numel() for parameter in model.parameters())
    assert (cost.matrices, cost.rows, cost.dim) == (1 if tied else 2, 400, 16)
    assert (cost.weight_bytes, cost.training_bytes, cost.parameters) == (rows * 4, rows * 16, total)
    assert cost.share == pytest.approx(rows / total)


def call(*words: str | Path) -> int:
    return commands.call(vocab_command, *words)


def test_the_command_tells_and_prunes(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run_of(tmp_path / "run", True)
    (text,) = file_of(tmp_path, PLAY).files
    assert call("stats", tmp_path / "run", text, "--json") == 0
    told = json.loads(capsys.readouterr().out)
    assert told["model"]["rows"] == told["vocab_size"] == 400
    assert call("stats", tmp_path / "run", text) == 0
    shown = capsys.readouterr().out
    assert f"{told['bytes_per_token']:.2f} bytes per token" in shown
    assert "400 x 16, the head shares them" in shown
    assert call("stats", tmp_path / "run" / "step-000001" / "tokenizer.json", text, "--dim", 64, "--json") == 0
    assert json.loads(capsys.readouterr().out)["training_bytes_at_dim"] == 400 * 64 * 16

    assert call("prune", tmp_path / "run", text, "--keep", 300, "--out", tmp_path / "small", "--json") == 0
    made = json.loads(capsys.readouterr().out)
    assert (made["old_vocab_size"], made["vocab_size"]) == (400, 300)
    assert made["tokens"] == len(load(Path(made["folder"])).encode(PLAY)) > made["old_tokens"]
    assert call("stats", tmp_path / "small", text, "--json") == 0
    assert json.loads(capsys.readouterr().out)["tokens"] == made["tokens"]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("stats", "{}/nowhere", "{}/text.txt"), "nothing at .*nowhere; give a tokenizer.json"),
        (("stats", "{}", "{}/text.txt"), "holds neither a tokenizer.json nor a checkpoint"),
        (("stats", "{}/run", "{}/none.txt"), "no text file at"),
        (("stats", "{}/run", "{}/empty.txt"), "the text is empty"),
        (("stats", "{}/run", "{}/text.txt", "--dim", "0"), "--dim is 0; it must be at least 1"),
        (("prune", "{}/run", "{}/text.txt", "--keep", "12", "--out", "{}/new"), "keep is 12; it must be from 257"),
        (("prune", "{}/run", "{}/empty.txt", "--out", "{}/new"), "the text is empty"),
        (("prune", "{}/run", "{}/text.txt", "--out", "{}/run"), "is there already"),
        (("prune", "{}/run/step-000001/tokenizer.json", "{}/text.txt", "--out", "{}/new"), "no checkpoint"),
    ],
)
def test_the_command_refuses_in_one_line_and_writes_nothing(tmp_path: Path, words: tuple[str, ...], message: str) -> None:
    run_of(tmp_path / "run", True)
    file_of(tmp_path, PLAY)
    (tmp_path / "empty.txt").write_text("")
    with pytest.raises(UsageError, match=message) as caught:
        call(*(word.format(tmp_path) for word in words))
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "new").exists()


def test_a_reader_that_goes_away_is_no_error_of_the_texts(tmp_path: Path) -> None:
    LibraryTokenizer(gpt2()).save(tmp_path / "tokenizer.json")
    (text,) = file_of(tmp_path, PLAY).files

    def closed(*_: object) -> None:
        raise BrokenPipeError

    with pytest.MonkeyPatch.context() as patch, pytest.raises(BrokenPipeError):
        patch.setattr("builtins.print", closed)
        call("stats", tmp_path, text)


def test_the_command_is_offered() -> None:
    assert command_line.commands()["vocab"] == "sickbay.cli.vocab"
    assert math.isnan(vocab.Counts(np.zeros(3, dtype=np.int64), 0).bytes_per_token)
